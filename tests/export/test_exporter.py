"""Checked exports: a new process finds what was written, or nothing is left of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import HISPEC, disturbed, run, tiny_hf, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.config import ExitConfig
from hispec.export import verify
from hispec.export.exporter import base_of, export, export_untrained
from hispec.models.exit_model import ExitModel

TOKENS = torch.arange(3, 24)[None]

LOGITS = """
import sys, torch, hispec
from safetensors.torch import save_file
lm = hispec.load(sys.argv[1], dtype=torch.float32, device="cpu")
tokens, found, at = torch.arange(3, 24)[None], {}, 0
with torch.inference_mode():
    hidden = lm.model.embed(tokens)
    for depth in lm.ladder():
        hidden, at = lm.model.run(hidden, at, depth), depth
        found[str(depth)] = lm.model.logits(depth, hidden).contiguous()
save_file(found, sys.argv[2])
"""


@torch.inference_mode()
def all_logits(model: ExitModel) -> dict[str, torch.Tensor]:
    hidden, found, at = model.embed(TOKENS), {}, 0
    for depth in [*model.exits.depths, model.num_layers]:
        hidden, at = model.run(hidden, at, depth), depth
        found[str(depth)] = model.logits(depth, hidden)
    return found


def logits_elsewhere(folder, tmp_path) -> dict[str, torch.Tensor]:
    """What a new Python reads at every exit."""
    done = subprocess.run(
        [sys.executable, "-c", LOGITS, str(folder), str(tmp_path / "logits")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "logits")


@pytest.mark.slow
def test_trained_exported_and_loaded_elsewhere_gives_the_same_bits(tiny_base, texts, tmp_path):
    """Train two steps, export light and full, load in a new process: the trainer's own logits."""
    from train.recipe import load_recipe
    from train.trainer import Trainer

    trainer = Trainer(
        load_recipe(
            ["recipe=smollm2-135m", f"base={tiny_base}", f"output={tmp_path / 'ee'}", "exits=[2,4]",
             f"data={texts}", "seq_len=32", "steps=2", "eval_every=2", "eval_sequences=4",
             "precision=fp32", "threads=1", "lr=0.01", "draft_vocab=0"]
        )
    )  # fmt: skip
    trainer.train()
    wanted = all_logits(trainer.model.eval())
    untouched = ExitModel(load_base(tiny_base), ExitConfig.of([2, 4], "block", blocks=2)).eval()
    assert not torch.equal(wanted["2"], all_logits(untouched)["2"])  # it did learn
    for full in (False, True):
        target = tmp_path / f"full-{full}"
        export(tmp_path / "ee", target, full=full)
        found = logits_elsewhere(target, tmp_path)
        assert found.keys() == wanted.keys() == {"2", "4", "6"}
        for depth, logits in wanted.items():
            assert torch.equal(found[depth], logits), depth
        check = checkpoint.read_config(target)["figures"]["check"]
        assert check["text"] == f"held-out documents of {texts}"
        assert (check["prompts"], check["ladder"]) == (8, [2, 4, 6])
        assert 8 <= check["new_tokens"] <= 8 * 24
        assert [(m["shallow"], m["deep"]) for m in check["agreement"]] == [(2, 6), (4, 6), (2, 4)]
        assert 0 <= check["acceptance"]["2"] <= 1
        card = (target / "README.md").read_text()
        assert f"{check['new_tokens']} new tokens, ladder 2, 4, 6: the full model's own" in card


@pytest.fixture
def saved(tiny_base, tmp_path):
    base = find_base(str(tiny_base))
    model = ExitModel(load_base(base.folder), ExitConfig.of([2, 4], "block", blocks=1)).eval()
    checkpoint.save_checkpoint(tmp_path / "ee", disturbed(model), base)
    return tmp_path / "ee"


def request(source, written, **more):
    return verify.Request(str(source), str(written), **more)


def test_every_family_passes_its_check(family, tmp_path):
    """Full exports of tiny models of all families, checked as the new process does it."""
    hf = tiny_hf(family, vocab_size=330)
    hf.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = disturbed(tiny_model(family, exits=(2, 4), vocab_size=330))
    base = find_base(str(tmp_path / "base"))
    checkpoint.save_checkpoint(tmp_path / "light", model, base)
    checkpoint.save_checkpoint(tmp_path / "full", model, base, full=True)
    found = verify.verify(request(tmp_path / "light", tmp_path / "full"))
    assert (found["logits_difference"], found["near_ties"]) == (0, 0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    with torch.inference_mode():
        assert torch.equal(plain(TOKENS).logits, all_logits(model)["6"])


@pytest.mark.slow
def test_what_differs_is_said_and_nothing_is_left(saved, tmp_path, monkeypatch):
    """One weight of one head changes on its way to the disk; its hash is right all the same."""

    def wrong(tensors, path, **options):
        tensors["exits.4.norm.weight"][5] += 1e-3
        save_file(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", wrong)
    with pytest.raises(ValueError, match=r"failed its check.*logits at depth 4 differ by up to"):
        export(saved, tmp_path / "out", full=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ee"]


def test_a_text_that_differs_fails_but_a_near_tie_is_counted(saved, tmp_path, monkeypatch):
    from hispec.decoding import decoder as decode

    class Wrong(decode.Decode):
        """A ladder whose third token is off by one."""

        def finish(self):
            texts = super().finish()
            if len(self.config.ladder) > 1:
                texts[1][2] = (texts[1][2] + 1) % 320
            return texts

    monkeypatch.setattr(verify, "Decode", Wrong)
    with pytest.raises(ValueError, match=r"prompt 1: the text of the ladder \(2, 4, 6\) differs"):
        verify.verify(request(saved, saved))
    monkeypatch.setattr(verify, "NEAR_TIE", 1e6)
    assert verify.verify(request(saved, saved))["near_ties"] == 1


def test_the_check_sees_other_exits(saved, tiny_base, tmp_path):
    with pytest.raises(ValueError, match=r"it has exits at \[2, 4, 6\], its source at \[3, 6\]"):
        verify.verify(request(tiny_base, saved, exits=[3]))


@pytest.mark.slow
def test_a_check_that_dies_fails_the_export(saved, tmp_path, monkeypatch):
    from hispec.export import exporter as module

    real = subprocess.run

    def killed(words, **options):
        return real([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(verify.subprocess, "run", killed)
    with pytest.raises(ValueError, match="was ended by signal 9; it needs memory"):
        module.export(saved, tmp_path / "out", full=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_layerskip_model_is_checked_on_lines_of_text(tiny_base, tmp_path):
    export_untrained(str(tiny_base), [3, 5], tmp_path / "shared", full=True)
    check = checkpoint.read_config(tmp_path / "shared")["figures"]["check"]
    assert (check["text"], check["prompts"]) == ("eight short texts", 8)
    with pytest.raises(ValueError, match="is not empty and no EE checkpoint"):
        export_untrained(str(tiny_base), [3], tiny_base, full=False)


def test_what_the_checkpoint_does_not_say_of_its_base_its_folder_does(saved, tiny_base, tmp_path):
    """Of a checkpoint without a Hub id; what a checkpoint says itself stays."""
    shutil.copytree(tiny_base, tmp_path / "base")
    note = {"hub_id": "org/base", "license": "mit", "trained": True}
    (tmp_path / "base" / "provenance.json").write_text(json.dumps(note))
    config = checkpoint.read_config(saved)
    assert config["base"]["hub_id"] is None
    config["base"]["license"] = "apache-2.0"
    base = base_of(saved, config, str(tmp_path / "base"))
    assert (base.hub_id, base.license, base.trained) == ("org/base", "apache-2.0", False)


def test_every_file_has_its_hash(saved, tiny_base, tmp_path):
    """A changed tokenizer or config is refused like a changed weight."""
    model, _ = checkpoint.load_checkpoint(saved)
    base = find_base(str(tiny_base))
    checkpoint.save_checkpoint(tmp_path / "full", model, base, full=True)
    config = checkpoint.read_config(tmp_path / "full")
    on_disk = {
        file.relative_to(tmp_path / "full").as_posix()
        for file in (tmp_path / "full").rglob("*")
        if file.is_file()
    }
    named = {*config["files"], *config["base"]["weights"]}
    assert on_disk - named == {"README.md", "exit_config.json"}
    for name in ("tokenizer.json", "config.json"):
        copy = tmp_path / f"changed-{name}"
        shutil.copytree(tmp_path / "full", copy)
        (copy / name).write_text((copy / name).read_text() + "\n")
        with pytest.raises(ValueError, match=f"{name} is damaged or was changed: SHA-256"):
            checkpoint.load_checkpoint(copy)
        (copy / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            checkpoint.load_checkpoint(copy)
    (tmp_path / "full" / "README.md").write_text("# edited")
    checkpoint.load_checkpoint(tmp_path / "full")


def test_shards_are_read_and_a_flipped_byte_in_one_is_refused(saved, tiny_base, tmp_path):
    """A base in many files, and a trained trunk written in many."""
    other = tmp_path / "base"
    shutil.copytree(tiny_base, other)
    (other / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(other, max_shard_size="60KB")
    model, _ = checkpoint.load_checkpoint(saved)
    checkpoint.save_checkpoint(tmp_path / "full", model, find_base(str(other)), full=True)
    shards = sorted((tmp_path / "full").glob("model-*.safetensors"))
    assert len(shards) > 2
    loaded, _ = checkpoint.load_checkpoint(tmp_path / "full")
    for depth, logits in all_logits(model).items():
        assert torch.equal(all_logits(loaded)[depth], logits)
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shards[1].name}: \w{{64}} instead of"):
        checkpoint.load_checkpoint(tmp_path / "full")


def test_a_trained_trunk_is_sharded_too(saved, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", "60KB")
    model, _ = checkpoint.load_checkpoint(saved)
    trunk = {name: tensor + 0.01 for name, tensor in model.hf.state_dict().items()}
    checkpoint.save_checkpoint(tmp_path / "full", model, find_base(str(tiny_base)), trunk=trunk)
    assert len(list((tmp_path / "full").glob("model-*.safetensors"))) > 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, trunk[name]), name
    loaded, _ = checkpoint.load_checkpoint(tmp_path / "full")
    assert torch.equal(all_logits(loaded)["6"], plain.eval()(TOKENS).logits)


def test_the_full_folders_greedy_text_is_the_targets(full):
    """Plain transformers knows nothing of exits and writes what the ladder writes."""
    import hispec

    lm = hispec.load(full, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(full).eval()
    tokenizer = AutoTokenizer.from_pretrained(full)
    for prompt in ("def main():", "import os", "class A:\n"):
        inputs = tokenizer(prompt, return_tensors="pt")
        text = plain.generate(**inputs, max_new_tokens=20, do_sample=False)
        ours = lm.generate(prompt, chat=False, max_new_tokens=20).tokens[0]
        assert text[0, inputs["input_ids"].shape[1] :].tolist() == ours


@pytest.mark.parametrize("depth", [2, 5])
def test_transformers_own_early_exit_works_on_it(full, depth):
    """LayerSkip's generation of transformers: any depth through the final norm."""
    plain = AutoModelForCausalLM.from_pretrained(full).eval()
    inputs = AutoTokenizer.from_pretrained(full)("def main():", return_tensors="pt")
    wanted = plain.generate(**inputs, max_new_tokens=20, do_sample=False)
    text = plain.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_early_exit=depth)
    assert torch.equal(text, wanted)


@pytest.mark.slow
def test_the_command_says_what_was_checked(saved, tmp_path):
    done = run(*HISPEC, "export", saved, tmp_path / "out", "--full")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "exit_config.json").read_text())["figures"]["check"]
    shares = figures["acceptance"]
    assert (
        f"verified: 8 prompts, {figures['new_tokens']} new tokens, accepted of the drafts "
        f"{shares['2']:.3f} at depth 2, {shares['4']:.3f} at depth 4\n"
    ) in done.stdout
    inspected = run(*HISPEC, "inspect", tmp_path / "out").stdout
    assert f"checked: 8 prompts, {figures['new_tokens']} new tokens, accepted" in inspected
    assert (tmp_path / "out" / "exits.safetensors").stat().st_mode & 0o044
