"""An exit as a model of its own: the exit's logits, plain transformers, refused where it cannot."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import HISPEC, disturbed, run, tiny_hf, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hispec.base_models.local import LocalBase, find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.config import ExitConfig
from hispec.export.draft_model import draft_model, export_draft
from hispec.export.exporter import export_as
from hispec.models.exit_model import ExitModel


@torch.inference_mode()
def exit_logits(model: ExitModel, depth: int, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(depth, model.run(model.embed(tokens), 0, depth))


@pytest.mark.parametrize("head", ["block", "shared"])
def test_a_draft_model_gives_the_logits_of_its_exit(family, head, tmp_path):
    """In every family, windows and layers without rotation included, after reading it back."""
    model = disturbed(tiny_model(family, exits=(3, 4), head=head))
    base = LocalBase("tiny", tmp_path, {})
    export_draft(model, base, "ee", 3, tmp_path / "draft")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "draft").eval()
    assert loaded.config.num_hidden_layers == 3 + (2 if head == "block" else 0)
    tokens = torch.randint(3, 61, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, exit_logits(model, 3, tokens))
        if head == "block":  # the exit is not just the model cut short
            assert not torch.equal(exit_logits(model, 3, tokens), exit_logits(model, 4, tokens))


def test_tied_embeddings_stay_tied(tmp_path):
    model = disturbed(tiny_model("llama", exits=(2,), tie_word_embeddings=True))
    draft = draft_model(model, 2)
    assert draft.lm_head.weight is draft.model.embed_tokens.weight
    export_draft(model, LocalBase("tiny", tmp_path, {}), "ee", 2, tmp_path / "draft")


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """An EE checkpoint whose heads are no copies, with a reduced draft vocabulary."""
    base = find_base(str(tiny_base))
    exits = ExitConfig.of([2, 4], "block", blocks=2, draft_vocab=50)
    model = disturbed(ExitModel(load_base(base.folder), exits).eval())
    folder = tmp_path_factory.mktemp("ee") / "ee"
    checkpoint.save_checkpoint(folder, model, base)
    return folder, model


@pytest.mark.parametrize("temperature", [None, 0.9])
def test_assisted_generation_takes_it_and_gives_the_targets_text(
    trained, tiny_base, tmp_path, temperature
):
    said = export_as("draft-model", str(trained[0]), tmp_path / "draft", depth=4)
    assert "draft vocabulary of 50 tokens is not taken over" in said
    target = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "draft")
    inputs = tokenizer("def main():", return_tensors="pt")
    wanted = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    if temperature is None:
        text = target.generate(**inputs, max_new_tokens=24, do_sample=False, assistant_model=draft)
        assert torch.equal(text, wanted)
    else:  # sampled text has the target's distribution, but is another text
        torch.manual_seed(0)
        text = target.generate(
            **inputs,
            max_new_tokens=24,
            do_sample=True,
            temperature=temperature,
            assistant_model=draft,
        )
        assert text.shape[1] > inputs["input_ids"].shape[1]


def test_a_layerskip_model_is_read_through_its_final_norm(tiny_base, tmp_path):
    """Every depth of a plain model, trained to be read so or not."""
    export_as("draft-model", str(tiny_base), tmp_path / "draft", depth=5)
    target = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft").eval()
    tokens = torch.arange(3, 30)[None]
    with torch.inference_mode():
        state = target(tokens, output_hidden_states=True).hidden_states[5]
        assert torch.equal(draft(tokens).logits, target.lm_head(target.model.norm(state)))


@pytest.mark.parametrize(
    ("exits", "depth", "message"),
    [
        (ExitConfig.of([2], "adapter"), 2, "head='adapter' is not possible: no plain model"),
        (
            ExitConfig.of([2], "block", blocks=1, previous=True),
            2,
            "exit=2 is not possible: a head that reads the full",
        ),
        (
            ExitConfig.of([2, 4], "block", blocks=1),
            3,
            "exit=3 is not possible: one of the exits, 2, 4",
        ),
        (
            ExitConfig.of([2, 4], "block", blocks=1),
            6,
            "exit=6 is not possible: a depth from 1 to 5",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(exits, depth, message, tmp_path):
    model = ExitModel(tiny_hf(), exits).eval()
    with pytest.raises(ValueError, match=message):
        export_draft(model, LocalBase("x", tmp_path, {}), "ee", depth, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_cannot_say_it_is_refused(monkeypatch, tmp_path):
    """A family whose layers differ by something that is not in the lists known here."""
    from hispec.export import draft_model as module

    model = disturbed(tiny_model("smollm3", exits=(2,)))
    monkeypatch.setattr(module, "_PER_LAYER", ("layer_types",))  # forgets the missing rotation
    with pytest.raises(ValueError, match=r"exit=2 cannot be written as a model of its own.*differ"):
        draft_model(model, 2)


def test_only_drafts_are_replaced(trained, tmp_path):
    target = tmp_path / "draft"
    export_as("draft-model", str(trained[0]), target, depth=2)
    export_as("draft-model", str(trained[0]), target, depth=4)
    assert json.loads((target / "provenance.json").read_text())["exit"] == 4
    (target / "provenance.json").unlink()
    with pytest.raises(ValueError, match="is not empty and no draft model"):
        export_as("draft-model", str(trained[0]), target, depth=2)
    with pytest.raises(ValueError, match="is a file"):
        export_as("draft-model", str(trained[0]), target / "config.json", depth=2)


def test_a_file_that_says_something_else_is_noticed(trained, monkeypatch, tmp_path):
    """The written file is compared with the model before it gets its name."""
    from transformers import LlamaForCausalLM

    write = LlamaForCausalLM.save_pretrained

    def wrong(self, folder, **options):
        with torch.no_grad():
            self.model.norm.weight[3] += 1
        write(self, folder, **options)
        with torch.no_grad():
            self.model.norm.weight[3] -= 1

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", wrong)
    with pytest.raises(ValueError, match=r"reads the draft model otherwise: model.norm.weight"):
        export_as("draft-model", str(trained[0]), tmp_path / "draft", depth=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command(trained, tmp_path):
    out = tmp_path / "draft"
    done = run(*HISPEC, "export", trained[0], out, "--as", "draft-model", "--exit", "2")
    assert done.returncode == 0, done.stderr
    assert f"draft-model: {out}; the draft vocabulary of 50 tokens is not" in done.stdout
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    for words, message in (
        (
            ("--as", "draft-model"),
            "exit=None is not possible: a draft model is made of one exit, name its",
        ),
        (("--as", "onnx"), "as='onnx' is not possible: one of draft-model, gguf"),
        (("--exit", "2"), "exit=2 is not possible: only with --as"),
        (("--as", "gguf", "--full"), "full=True is not possible"),
    ):
        wrong = run(*HISPEC, "export", trained[0], tmp_path / "no", *words)
        assert (wrong.returncode, message in wrong.stderr) == (2, True), wrong.stderr


def test_tokenizer_files_are_taken_over_byte_for_byte(trained, tiny_base, tmp_path):
    """And nothing else of the base."""
    other = tmp_path / "base"
    shutil.copytree(tiny_base, other)
    (other / "LICENSE").write_text("mine")
    (other / "pytorch_model.bin").write_bytes(b"pickle")
    export_as("draft-model", str(trained[0]), tmp_path / "draft", depth=2, base=str(other))
    names = {file.name for file in (tmp_path / "draft").iterdir()}
    assert {"LICENSE", "README.md", "tokenizer.json", "model.safetensors", "config.json"} <= names
    assert not {"pytorch_model.bin", "exit_config.json"} & names
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "draft" / name).read_bytes() == (tiny_base / name).read_bytes()
