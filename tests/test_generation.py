"""`custom_generate`: a plain transformers model decodes through the exits of a checkpoint."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import disturbed, tiny_hf, tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    StoppingCriteria,
    TextStreamer,
)

from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.config import ExitConfig
from hispec.decoding import decoder as decode
from hispec.models.exit_model import ExitModel


@pytest.fixture(autouse=True)
def _modules_elsewhere(tmp_path, monkeypatch):
    """transformers copies what it runs to its cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def plain(tiny_base):
    """Of the base, not of the checkpoint: the exits come from `exits_from` alone."""
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


@pytest.fixture(scope="module")
def tokenizer(full):
    return AutoTokenizer.from_pretrained(full, padding_side="left")


@pytest.fixture
def passes(monkeypatch):
    """The decodes that ran, so that no test passes because the exits were left out."""
    made = []
    build = decode.Decode.__init__

    def noted(self, *words, **options):
        build(self, *words, **options)
        made.append(self)

    monkeypatch.setattr(decode.Decode, "__init__", noted)
    yield made
    assert made
    assert all(sum(r.passes for r in run.stats.rungs[:-1]) > 0 for run in made)


def texts(plain, full, inputs, **settings):
    """(through the exits, by transformers alone)."""
    ours = {
        key: settings.pop(key) for key in ("ladder", "draft_length", "backend") if key in settings
    }
    settings = {"max_new_tokens": 20, "do_sample": False, **settings}
    return plain.generate(**inputs, **settings, **ours, **with_exits(full)), plain.generate(
        **inputs, **settings
    )


def with_exits(full):
    """Arguments with which `generate` decodes through the exits of a folder."""
    return {"custom_generate": str(full), "exits_from": str(full), "trust_remote_code": True}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ladder": [4, 6], "draft_length": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"max_length": 30, "max_new_tokens": None},
        {"min_new_tokens": 8, "eos_token_id": list(range(3, 60))},
        {"eos_token_id": list(range(3, 40))},
        {"suppress_tokens": list(range(100, 200))},
    ],
)
def test_greedy_text_is_that_of_generate(plain, full, tokenizer, passes, settings):
    inputs = tokenizer("def main(argv):", return_tensors="pt")
    ours, theirs = texts(plain, full, inputs, **settings)
    assert torch.equal(ours, theirs)


def test_rows_with_left_padding(plain, full, tokenizer, passes):
    inputs = tokenizer(["def main():", "x", "class A(B):\n    def f(self"], return_tensors="pt",
                       padding=True)  # fmt: skip
    assert (inputs["attention_mask"] == 0).any()
    ours, theirs = texts(plain, full, inputs)
    assert torch.equal(ours, theirs)
    ours, theirs = texts(plain, full, inputs, eos_token_id=list(range(3, 40)))
    assert torch.equal(ours, theirs)  # rows that end early are padded alike
    assert len({len(row[row != 0]) for row in ours}) > 1


class Ban(LogitsProcessor):
    """Looks at the whole prefix: the token two places back may not come again."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:-1], -torch.inf)


class Stop(StoppingCriteria):
    """Ends a row of 24 tokens."""

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 24)


def test_processors_criteria_and_stop_strings(plain, full, tokenizer, passes):
    from transformers import LogitsProcessorList, StoppingCriteriaList

    inputs = tokenizer("import os, sys", return_tensors="pt")
    for settings in (
        {"logits_processor": LogitsProcessorList([Ban()])},
        {"stopping_criteria": StoppingCriteriaList([Stop()]), "max_new_tokens": 60},
    ):
        ours, theirs = texts(plain, full, inputs, **settings)
        assert torch.equal(ours, theirs)
    new = tokenizer.decode(theirs[0, inputs["input_ids"].shape[1] :])
    string = next(letter for letter in new[3:] if letter.isascii() and letter.isalpha())
    ours, theirs = texts(
        plain, full, inputs, stop_strings=[string], tokenizer=tokenizer, max_new_tokens=60
    )
    assert torch.equal(ours, theirs)
    assert ours.shape[1] < inputs["input_ids"].shape[1] + 60


def test_a_streamer_gets_every_token(plain, full, tokenizer, passes, capsys):
    inputs = tokenizer("def main():", return_tensors="pt")
    ours, theirs = texts(plain, full, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert torch.equal(ours, theirs)
    shown = capsys.readouterr().out
    new = tokenizer.decode(ours[0, inputs["input_ids"].shape[1] :])
    assert shown == 2 * (new + "\n")


def sampled(plain, full, inputs, **settings):
    return plain.generate(
        **inputs, max_new_tokens=20, do_sample=True, **settings, **with_exits(full)
    )


def test_sampling_follows_the_seed_and_not_the_ladder(plain, full, tokenizer, passes):
    inputs = tokenizer("def main():", return_tensors="pt")
    warped = dict(temperature=0.7, top_k=20, top_p=0.9)
    first = sampled(plain, full, inputs, seed=3, **warped)
    assert torch.equal(first, sampled(plain, full, inputs, seed=3, ladder=[2, 6], **warped))
    assert not torch.equal(first, sampled(plain, full, inputs, seed=4, **warped))
    torch.manual_seed(9)
    by_global = sampled(plain, full, inputs, **warped)
    torch.manual_seed(9)
    assert torch.equal(by_global, sampled(plain, full, inputs, **warped))
    rows = sampled(plain, full, inputs, seed=3, num_return_sequences=3, **warped)
    assert len({tuple(row.tolist()) for row in rows}) == 3


def test_sampling_keeps_to_top_k(plain, full, tokenizer, passes):
    """With one candidate left it is the greedy text, at any temperature."""
    inputs = tokenizer("def main():", return_tensors="pt")
    _, greedy = texts(plain, full, inputs)
    assert torch.equal(sampled(plain, full, inputs, temperature=1.5, top_k=1), greedy)


def test_sampled_tokens_have_the_distribution_of_transformers(plain, full, tokenizer, passes):
    """The first token of many rows, against the probabilities that transformers draws from."""
    inputs = tokenizer("def", return_tensors="pt")
    rows = plain.generate(
        **inputs, max_new_tokens=2, do_sample=True, temperature=0.5, top_k=4, seed=1,
        num_return_sequences=2000, **with_exits(full),
    )  # fmt: skip
    with torch.inference_mode():
        top = (plain(**inputs).logits[0, -1] / 0.5).topk(4)
    probs = top.values.softmax(-1)
    first = rows[:, inputs["input_ids"].shape[1]]
    assert set(first.tolist()) <= set(top.indices.tolist())
    shares = torch.stack([(first == token).float().mean() for token in top.indices])
    assert (shares - probs).abs().max() < 0.05


def test_every_family(family, tmp_path, passes):
    hf = tiny_hf(family)
    hf.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = disturbed(tiny_model(family, exits=(2, 4)))
    base = find_base(str(tmp_path / "base"))
    checkpoint.save_checkpoint(tmp_path / "full", model, base, full=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    inputs = {"input_ids": torch.arange(3, 16)[None]}
    ours, theirs = texts(plain, tmp_path / "full", inputs)
    assert torch.equal(ours, theirs)


def test_loaded_with_trust_generate_is_replaced(full, tokenizer, passes):
    """`from_pretrained(trust_remote_code=True)` makes it the model's `generate`."""
    model = AutoModelForCausalLM.from_pretrained(full, trust_remote_code=True).eval()
    inputs = tokenizer("def main():", return_tensors="pt")
    ours = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    alone = AutoModelForCausalLM.from_pretrained(full).eval()
    assert torch.equal(ours, alone.generate(**inputs, max_new_tokens=12, do_sample=False))


def test_the_exits_are_loaded_once_and_the_model_stays_a_plain_one(plain, full, tokenizer):
    names = set(plain.state_dict())
    inputs = tokenizer("def main():", return_tensors="pt")
    texts(plain, full, inputs)
    kept = vars(plain)["_hispec_exits"][1]
    texts(plain, full, inputs)
    assert vars(plain)["_hispec_exits"][1] is kept
    assert set(plain.state_dict()) == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "generation mode='beam_search' is not possible: one of greedy"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True is not possible"),
        ({"ladder": [2, 5]}, r"ladder=\(2, 5\) is not possible: it must end at 6"),
        ({"drafter": "wish"}, "drafter='wish' is not possible"),
        ({"stop_strings": "x"}, "tokenizer=None is not possible: stop_strings need it"),
        ({"guidance_scale": 2.0}, "logits_processor='UnbatchedClassifierFree"),
        ({"prompt_lookup_num_tokens": 3}, "generation mode='assisted_generation' is not"),
    ],
)
def test_what_is_not_possible_is_named(plain, full, tokenizer, settings, message):
    inputs = tokenizer("def main():", return_tensors="pt")
    with pytest.raises(ValueError, match=message):
        plain.generate(**inputs, max_new_tokens=4, **settings, **with_exits(full))


def test_padding_at_the_right_and_counted_padding_are_refused(plain, full, tokenizer):
    rows = tokenizer(["def main():", "x"], return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match=r"Min\w*Length.* is not possible: it counts padding"):
        texts(plain, full, rows, min_new_tokens=3)
    right = {key: value.flip(1) for key, value in rows.items()}
    with pytest.raises(ValueError, match="padding at the left only"):
        texts(plain, full, right)


def test_exits_of_another_model_are_refused(full, tokenizer):
    other = tiny_hf(vocab_size=320, layers=4)
    with pytest.raises(ValueError, match="num_hidden_layers=4, but the exits belong to 6"):
        texts(other, full, tokenizer("x = 1", return_tensors="pt"))


def test_without_trust_nothing_runs(plain, full, tokenizer):
    inputs = tokenizer("def main():", return_tensors="pt")
    with pytest.raises(ValueError, match="trust_remote_code"):
        plain.generate(**inputs, custom_generate=str(full), trust_remote_code=False)


def test_without_hispec_the_message_says_so(plain, full, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "hispec.generation", None)
    inputs = tokenizer("def main():", return_tensors="pt")
    with pytest.raises(ImportError, match=r"with the package hispec.*pip install -U hispec"):
        texts(plain, full, inputs)


def test_no_checkpoint_there(plain, tokenizer):
    from hispec.generation import generate

    with pytest.raises(ValueError, match=r"no EE checkpoint at .*exits_from"):
        generate(plain, **tokenizer("x", return_tensors="pt"))
    with pytest.raises(ValueError, match=r"no EE checkpoint at 'not/there/at-all'"):
        generate(plain, exits_from="not/there/at-all", **tokenizer("x", return_tensors="pt"))


def kept_exits(model) -> list[int]:
    """Of the checkpoint that a model decoded with last."""
    return vars(model)["_hispec_exits"][1].exits.depths


def test_the_checkpoint_that_the_model_was_loaded_from_is_found(full, tokenizer, passes):
    model = AutoModelForCausalLM.from_pretrained(full).eval()
    inputs = tokenizer("def main():", return_tensors="pt")
    words = dict(**inputs, max_new_tokens=12, do_sample=False)
    ours = model.generate(**words, custom_generate=str(full), trust_remote_code=True)
    assert torch.equal(ours, model.generate(**words))
    assert kept_exits(model) == [2, 4]


@pytest.fixture
def other(tiny_base, tmp_path):
    """A full checkpoint of the same base with other exits."""
    base = find_base(str(tiny_base))
    model = disturbed(
        ExitModel(load_base(base.folder), ExitConfig.of([3], "block", blocks=1)).eval()
    )
    checkpoint.save_checkpoint(tmp_path / "other", model, base, full=True)
    return tmp_path / "other"


def test_the_code_of_a_folder_finds_its_own_exits_or_asks_for_them(
    full, other, tokenizer, passes, tmp_path, monkeypatch
):
    """The model comes from one checkpoint, the code from another: never the wrong exits."""
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(full).eval()
    inputs = tokenizer("def main():", return_tensors="pt")
    words = dict(**inputs, max_new_tokens=12, do_sample=False, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"with the exits that are asked for.*exits_from="):
        model.generate(**words, custom_generate=str(other))
    model.generate(**words, custom_generate=str(other), exits_from=str(other))
    assert kept_exits(model) == [3]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "damaged").mkdir()
    (tmp_path / "checkpoints" / "damaged" / "exit_config.json").write_text("{")
    shutil.copytree(other, tmp_path / "checkpoints" / "mine")
    model.generate(**words, custom_generate=str(full))
    assert kept_exits(model) == [2, 4]
    model.generate(**words, custom_generate=str(other))  # found below checkpoints/ by its hash
    assert kept_exits(model) == [3]


def test_code_that_an_earlier_version_exported_still_runs(full, tokenizer, passes, tmp_path):
    folder = tmp_path / "earlier"
    shutil.copytree(full, folder)
    (folder / "custom_generate" / "generate.py").write_text(
        "def generate(model, **arguments):\n"
        "    from hispec.generation import generate as with_exits\n"
        "    return with_exits(model, **arguments)\n"
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer("def main():", return_tensors="pt")
    words = dict(**inputs, max_new_tokens=12, do_sample=False)
    ours = model.generate(**words, custom_generate=str(folder), trust_remote_code=True)
    assert torch.equal(ours, model.generate(**words))


def test_the_exits_follow_a_model_to_another_dtype(full, tokenizer, passes):
    """Before, the exits kept the dtype of the first call, which is a RuntimeError."""
    model = AutoModelForCausalLM.from_pretrained(full).eval()
    inputs = tokenizer("def main():", return_tensors="pt")
    words = dict(**inputs, max_new_tokens=12, do_sample=False)
    custom = {"custom_generate": str(full), "trust_remote_code": True}
    first = model.generate(**words, **custom)
    model.to(torch.bfloat16)
    assert torch.equal(model.generate(**words, **custom), model.generate(**words))
    assert next(vars(model)["_hispec_exits"][1].heads.parameters()).dtype == torch.bfloat16
    model.to(torch.float32)
    again = model.generate(**words, **custom)
    assert torch.equal(again, model.generate(**words))
    assert again.shape == first.shape


def test_nothing_is_found_by_walking_frames():
    code = "".join(
        file.read_text() for file in (Path(__file__).parents[1] / "hispec").rglob("*.py")
    )
    assert not re.findall(r"_getframe|currentframe|inspect\.stack|f_locals|f_back", code)


def test_the_backend_is_the_users_choice(plain, full, tokenizer, passes):
    inputs = tokenizer("def main():", return_tensors="pt")
    for backend in ("openvino", "eager", "openvino"):
        ours, theirs = texts(plain, full, inputs, backend=backend)
        assert ours.tolist() == theirs.tolist()
        assert passes[-1].stats.backend == backend
    with pytest.raises(ValueError, match=r"backend='onnx' is not possible"):
        plain.generate(**inputs, backend="onnx", **with_exits(full))
