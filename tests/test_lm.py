"""EarlyExitLM: text in, text out; a plain model with chosen depths; the command around it."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import HISPEC, ROOT, run, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)

import hispec
from hispec import checkpoint
from hispec.compare import first_difference, hf_generate
from hispec.config import ExitConfig
from hispec.model import ExitModel

PROMPT = "def main():\n    return"


@pytest.fixture(scope="module")
def lm(tiny_base):
    return hispec.load(tiny_base, exits=(2, 4), device="cpu")


@pytest.fixture(scope="module")
def ee(tiny_base, tmp_path_factory):
    """An EE checkpoint with fresh block heads."""
    base = checkpoint.find_base(str(tiny_base))
    model = ExitModel(checkpoint.load_base(base.folder), ExitConfig([2, 4], "block", 1))
    folder = tmp_path_factory.mktemp("ee") / "tiny-ee"
    checkpoint.save(folder, model, base, recipe={"data": "stdlib", "held_out": 0.05})
    return folder


def test_generate_equals_transformers(lm, tiny_base):
    tokens = lm.encode(PROMPT, chat=False)
    hf = AutoModelForCausalLM.from_pretrained(tiny_base)
    expected = hf_generate(hf, tokens, 30, lm.eos())
    for ladder in (None, "plain", (2, 6), (1, 3, 5, 6)):
        result = lm.generate(PROMPT, ladder=ladder, chat=False, max_new_tokens=30)
        assert result.tokens == [expected]
        assert result.text == [lm.tokenizer.decode(expected, skip_special_tokens=True)]
        assert len(result.depths[0]) == len(expected)
    assert lm.ladder() == [2, 4, 6]


def test_rows_are_what_they_are_alone(lm):
    prompts = [PROMPT, "import os", "class A:\n    pass\n"]
    together = lm.generate(prompts, max_new_tokens=12)
    assert together.text == [lm.generate(p, max_new_tokens=12).text[0] for p in prompts]
    assert together.stats.rows == 3


DRAFTERS = ("exit", "lookup", "recycle", "lookup+exit", "recycle+exit")


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sixteen_rows_are_what_they_are_alone(lm, drafter):
    prompts = [PROMPT[: 1 + n] + " x" * (n % 5) for n in range(16)]
    for law in ({}, {"temperature": 0.8, "seed": 3}):
        settings = dict(max_new_tokens=12, drafter=drafter, chat=False, **law)
        together = lm.generate(prompts, **settings)
        assert together.tokens == [lm.generate(p, **settings).tokens[0] for p in prompts]


def strings_over_borders(lm, tokens: list[int]) -> list[str]:
    """The end of one token with the beginning of the next, wherever both are plain characters."""
    words = [lm.tokenizer.decode([token]) for token in tokens]
    return [a[-1] + b[0] for a, b in itertools.pairwise(words) if a.isascii() and b.isascii()]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stop_strings_end_where_transformers_ends(lm, drafter):
    """Also where the string lies over a token border, or over two validations."""
    tokens = lm.encode(PROMPT, chat=False)
    plain = hf_generate(lm.model.hf, tokens, 40, lm.eos())
    strings = strings_over_borders(lm, plain)
    assert len(strings) > 5
    for string in strings[:6]:
        criteria = StoppingCriteriaList([StopStringCriteria(lm.tokenizer, [string])])
        expected = hf_generate(lm.model.hf, tokens, 40, lm.eos(), stopping_criteria=criteria)
        assert len(expected) < 40
        for buffer in (1, 5):
            settings = dict(chat=False, max_new_tokens=40, drafter=drafter, buffer=buffer)
            result = lm.generate(PROMPT, stop_strings=string, **settings)
            assert result.tokens[0] == expected
    rows = lm.generate([PROMPT, "import os"], chat=False, stop_strings=[strings[3], "zzzz"])
    assert rows.tokens[0] == lm.generate(PROMPT, chat=False, stop_strings=strings[3]).tokens[0]


def test_logits_processors_see_the_full_prefix(lm):
    """Bigrams over the whole text: a processor that saw the chunk alone would let them through."""
    tokens = lm.encode(PROMPT, chat=False)
    expected = hf_generate(
        lm.model.hf, tokens, 40, lm.eos(), repetition_penalty=1.3, no_repeat_ngram_size=2
    )
    assert expected != hf_generate(lm.model.hf, tokens, 40, lm.eos())
    extra = LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
    for drafter in DRAFTERS:
        common = dict(chat=False, max_new_tokens=40, drafter=drafter, repetition_penalty=1.3)
        own = lm.generate(PROMPT, no_repeat_ngram_size=2, **common)
        assert own.tokens[0] == expected
        assert lm.generate(PROMPT, logits_processor=extra, **common).tokens[0] == expected


def test_a_text_streamer_of_transformers_works(lm, capsys):
    streamer = TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = lm.generate(PROMPT, chat=False, max_new_tokens=20, streamer=streamer)
    assert capsys.readouterr().out == result.text[0] + "\n"
    with pytest.raises(ValueError, match="for one prompt only"):
        lm.generate([PROMPT, PROMPT], streamer=streamer)


def test_max_time_ends_after_the_round(lm):
    result = lm.generate(PROMPT, chat=False, max_new_tokens=200, max_time=1e-9)
    assert len(result.tokens[0]) == 1
    whole = lm.generate(PROMPT, chat=False, max_new_tokens=9, max_time=1e9)
    assert len(whole.tokens[0]) == 9


def test_a_loaded_transformers_model_decodes_as_it_is(lm, tiny_base):
    hf = AutoModelForCausalLM.from_pretrained(tiny_base)
    wrapped = hispec.EarlyExitLM.from_transformers(hf, lm.tokenizer, exits=(3,))
    assert wrapped.ladder("auto") == [3, 6]
    expected = hf_generate(hf, wrapped.encode(PROMPT), 12, wrapped.eos())
    assert wrapped.generate(PROMPT, max_new_tokens=12).tokens[0] == expected


def test_a_stream_adds_up_to_the_text(lm):
    """Also where a character is spread over several tokens."""
    for seed in range(5):
        settings = dict(max_new_tokens=60, temperature=1.5, seed=seed, chat=False)
        pieces = list(lm.stream("é", **settings))
        result = lm.generate("é", **settings)
        assert [piece.token for piece in pieces] == result.tokens[0]
        assert "".join(piece.text for piece in pieces) == result.text[0]


def test_the_chat_template_is_the_default_where_there_is_one(lm):
    chat = lm.tokenizer.decode(lm.encode("hello"))
    assert chat == "user: hello\nassistant: "
    assert lm.tokenizer.decode(lm.encode("hello", chat=False)) == "hello"
    bare = hispec.EarlyExitLM(lm.model, tiny_tokenizer())
    bare.tokenizer.chat_template = None
    assert bare.tokenizer.decode(bare.encode("hello")) == "hello"
    with pytest.raises(ValueError, match="no chat template"):
        bare.encode("hello", chat=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ladder": "fast"}, "ladder='fast' is not possible: depths, 'auto' or 'plain'"),
        ({"ladder": "plain", "drafter": "lookup"}, "ladder 'plain' has no drafter"),
        ({"drafter": "guess"}, "drafter='guess' is not possible: one of exit, lookup"),
        ({"ladder": (6,), "drafter": "lookup+exit"}, "needs an exit below the full model"),
        ({"drafter": "recycle", "law": "rejection"}, "proposes trees, and these need 'match'"),
        ({"law": "typical"}, "law='typical' is not possible: one of match, rejection"),
        ({"lookup_ngram": 1}, "lookup_shortest=2 is not possible: at most lookup_ngram, 1"),
        ({"max_draft_length": 1}, "max_draft_length=1 is not possible"),
        ({"draft_treshold": 0.5}, "draft_treshold=0.5 is not possible: known settings"),
        ({"draft_threshold": 1.5}, "draft_threshold=1.5 is not possible: from 0"),
        ({"max_time": 0.0}, "max_time=0.0 is not possible"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is not possible"),
        ({"stop_strings": [""]}, "an empty string stops nothing"),
        ({"ladder": (2, 4)}, "must end at 6"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_settings_are_refused(lm, settings, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(PROMPT, **settings)
    with pytest.raises(ValueError, match="prompt='' is not possible"):
        lm.generate("")


def test_load_refuses_what_is_no_model(tmp_path, ee):
    with pytest.raises(ValueError, match="neither an EE checkpoint nor a transformers model"):
        hispec.load(tmp_path)
    with pytest.raises(ValueError, match="unknown base model 'no-such'"):
        hispec.load("no-such")
    with pytest.raises(ValueError, match="names its own exits"):
        hispec.load(ee, exits=(2,))
    with pytest.raises(ValueError, match="'checkpoints/dmeo' is no local folder"):
        hispec.load("checkpoints/dmeo")


def test_penalties_of_a_generation_config_do_not_enter_the_comparison(lm):
    hf, prompt = lm.model.hf, lm.encode(PROMPT, chat=False)
    plain, own = hf_generate(hf, prompt, 20), hf.generation_config
    hf.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    try:
        assert hf_generate(hf, prompt, 20) == plain
        assert hf.generation_config.repetition_penalty == 5.0
    finally:
        hf.generation_config = own


def test_first_difference_names_position_and_gap(lm):
    hf, prompt = lm.model.hf, lm.encode(PROMPT, chat=False)
    text = hf_generate(hf, prompt, 8)
    assert first_difference(hf, prompt, text, text) is None
    other = [*text[:5], (text[5] + 1) % 320, *text[6:]]
    found = first_difference(hf, prompt, other, text)
    assert (found.position, found.ours, found.theirs) == (5, other[5], text[5])
    with torch.inference_mode():
        top = hf(torch.tensor([prompt + text[:5]])).logits[0, -1].topk(2).values
    assert found.gap == pytest.approx((top[0] - top[1]).item(), abs=1e-4)
    short = first_difference(hf, prompt, text[:3], text)
    assert (short.position, short.ours, short.theirs) == (3, None, text[3])


@pytest.mark.slow
def test_the_command_streams_compares_and_counts(ee, lm):
    words = ("generate", ee, PROMPT, "--raw", "--max-new-tokens", "20", "--device", "cpu")
    plain = run(*HISPEC, *words)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == lm.generate(PROMPT, chat=False, max_new_tokens=20).text[0] + "\n"
    full = run(*HISPEC, *words, "--stats", "--show-rungs", "--compare", "--buffer", "3")
    assert full.returncode == 0, full.stderr
    assert "identical to transformers' generate: all 20 tokens" in full.stdout
    assert re.search(r"20 tokens in .* tokens/s; \d\.\d\d tokens per target pass", full.stdout)
    assert "depth 2" in full.stdout
    sampled = run(*HISPEC, *words, "--compare", "--temperature", "0.9", "--seed", "4")
    assert "identical to own plain decoding with the same seed" in sampled.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ladder", "2,x,6"], "ladder='2,x,6' is not possible: write depths such as 6,12,30"),
        (["--ladder", "2,4"], "ladder=(2, 4) is not possible: it must end at 6"),
        (["--dtype", "int4"], "dtype='int4' is not possible: one of auto, float32"),
        (["--temperature", "-1"], "temperature=-1.0 is not possible"),
        (["--device", "abacus"], "device='abacus' is not possible here"),
        (["--exits", "2"], "names its own exits"),
    ],
)
def test_the_command_refuses_cleanly(ee, words, message):
    done = run(*HISPEC, "generate", ee, PROMPT, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_export_writes_a_full_checkpoint(ee, tmp_path):
    done = run(*HISPEC, "export", ee, tmp_path / "full", "--full")
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    again = run(*HISPEC, "export", ee, ee)
    assert again.returncode == 2
    assert "name another folder" in again.stderr


@pytest.mark.slow
def test_export_makes_a_checkpoint_of_a_plain_model(tiny_base, tmp_path):
    done = run(*HISPEC, "export", tiny_base, tmp_path / "ls", "--exits", "2,4")
    assert done.returncode == 0, done.stderr
    assert hispec.load(tmp_path / "ls").ladder() == [2, 4, 6]


@pytest.mark.slow
def test_an_interrupted_export_is_cleaned_up_and_said(ee, tmp_path):
    """What a process killed in the middle of an export leaves: a hidden folder of a dead pid."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True).stdout.strip()  # fmt: skip
    half = tmp_path / f".out.tmp-{dead}"
    half.mkdir()
    (half / "exits.safetensors").write_bytes(b"half")
    done = run(*HISPEC, "export", ee, tmp_path / "out")
    assert "was interrupted: cleaned up" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_agreement_writes_table_json_and_picture(ee, tmp_path):
    done = run(
        *(sys.executable, "eval/agreement.py", f"checkpoint={ee}", f"output={tmp_path / 'out'}"),
        *("sequences=2", "seq_len=32"),
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert [(m["shallow"], m["deep"]) for m in line["agreement"]] == [(2, 6), (4, 6), (2, 4)]
    written = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert [m["shallow"] for m in written["untrained"]] == [1, 2, 3, 4, 5]
    picture = (tmp_path / "out" / "agreement.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    wrong = run(sys.executable, "eval/agreement.py", f"checkpoint={ee}", "seqences=2")
    assert wrong.returncode == 2
    assert "unknown key 'seqences'" in wrong.stderr


def test_evaluations_hold_out_what_the_training_held_out(tiny_base, texts):
    """Column and share come from the recipe of the checkpoint."""
    from eval.prompts import TextSource, held_out_documents

    base = checkpoint.find_base(str(tiny_base))
    model = ExitModel(checkpoint.load_base(base.folder), ExitConfig([2], "block", 1))
    folder = texts.parent / "ee"
    recipe = {"data": str(texts), "text_column": "source", "held_out": 0.2}
    checkpoint.save(folder, model, base, recipe=recipe)
    name, found = held_out_documents(TextSource(), str(folder))
    assert (name, len(found)) == (str(texts), 8)
    assert all(document.text.endswith(".py") for document in found)
    assert len(held_out_documents(TextSource(held_out=0.5), str(folder))[1]) == 20
    assert held_out_documents(TextSource(), str(tiny_base))[0] == "stdlib"


def test_agreement_by_hand(lm):
    """Against argmaxes and laws of whole-sequence logits."""
    from hispec.measure import agreement
    from hispec.packing import Rows

    rows = torch.randint(3, 320, (2, 50), generator=torch.Generator().manual_seed(3))
    (measured,) = agreement(lm.model, Rows.whole(rows), [(2, 6)])
    with torch.inference_mode():
        states = lm.model.hf(rows, output_hidden_states=True)
        q = lm.model.read(2, states.hidden_states[2]).softmax(-1)
        p = states.logits.softmax(-1)
    assert measured.top1 == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    assert measured.acceptance == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), abs=1e-5)


@pytest.mark.slow
def test_speed_times_all_settings_in_one_run(ee):
    done = run(
        *(sys.executable, "eval/speed.py", f"checkpoint={ee}", "prompts=2", "prompt_tokens=8"),
        *("max_new_tokens=12", "repeats=2"),
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    names = [row["setting"] for row in line["results"]]
    assert names == [
        "HF generate",
        "plain (6)",
        "LayerSkip (2, 6)",
        "LayerSkip (4, 6)",
        "HiSpec (2, 4, 6)",
        "prompt lookup (6)",
        "token recycling (6)",
        "ECHO (4, 6)",
    ]
    assert all(row["same_as_generate"] == row["same_as_plain"] == 2 for row in line["results"])
    assert line["results"][1]["tokens_per_target_pass"] == 1


@pytest.mark.slow
def test_lossless_passes_and_names_differences(ee, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"turns": ["hello"], "task": "a"}, {"prompt": "x = "}, {"question": "why?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"checkpoint={ee}", f"prompt_file={prompts}", "prompts=3", "max_new_tokens=16")
    for law in ((), ("temperature=0.8", "seed=2", "against=plain")):
        done = run(sys.executable, "eval/lossless.py", *words, *law)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["differences"] == []
    prompts.write_text('{"text": "x"}\n')
    wrong = run(sys.executable, "eval/lossless.py", *words)
    assert wrong.returncode == 2
    assert "line 1 has none of turns, question, prompt; it has: text" in wrong.stderr


def test_lossless_notices_a_difference(ee, monkeypatch, capsys):
    """A decoder that changes one token is caught, with position and gap, and exit code 1."""
    import eval.lossless
    from hispec import decode

    class Wrong(decode.Decode):
        def finish(self):
            (tokens,) = super().finish()
            return [[*tokens[:3], (tokens[3] + 1) % 320, *tokens[4:]]]

    monkeypatch.setattr(decode, "Decode", Wrong)
    words = [f"checkpoint={ee}", "prompts=1", "prompt_tokens=8", "max_new_tokens=8"]
    assert eval.lossless.main(words) == 1
    assert "differs at new token 3" in capsys.readouterr().out


@pytest.mark.slow
def test_the_readme_shows_commands_that_exist():
    """Every `hispec X` of the README is a command, every script a file."""
    readme = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^(?:\.venv/bin/)?hispec (\w+)", readme, re.M))
    listed = run(*HISPEC, "--help").stdout
    assert commands
    for command in commands:
        assert command in listed
    for script in re.findall(r"(?:python|launch) ((?:eval|train)/\w+\.py)", readme):
        assert (ROOT / script).is_file()
