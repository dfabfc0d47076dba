"""Trained trunks: who gets a gradient, what is skipped, what is exported, how drift is bounded."""

from __future__ import annotations

import pytest
import torch
from conftest import documents_of
from test_trainer import settings, train_to
from transformers import AutoModelForCausalLM

from hispec.checkpoint import io as checkpoint
from hispec.export.exporter import export
from train.recipe import load_recipe
from train.trainer import Trainer
from train.training_step import Batch


def trainer_of(tiny_base, texts, output, **changes) -> Trainer:
    return Trainer(load_recipe(settings(tiny_base, texts, output, **changes)))


def first_batch(trainer: Trainer, step: int = 0) -> Batch:
    return Batch.of(next(trainer._batches()), step)


@pytest.mark.parametrize("trunk", ["lora", "full"])
@pytest.mark.parametrize("head", ["shared", "adapter", "block"])
def test_every_trained_parameter_gets_a_gradient(tiny_base, texts, tmp_path, trunk, head):
    """The last block and every exit included; what is not trained gets none."""
    trainer = trainer_of(tiny_base, texts, tmp_path / "ee", trunk=trunk, head=head)
    if head == "adapter":  # a fresh one passes its input on: only `up` moves in the first step
        for exit_head in trainer.model.heads.values():
            torch.nn.init.normal_(exit_head.adapter.up.weight)
    for name, parameter in trainer.model.hf.named_parameters():
        if "lora_B" in name:  # starts at zero, so that `lora_A` would get none
            torch.nn.init.normal_(parameter, std=0.02)
    trainer._on_model(trainer.training_step, first_batch(trainer)).loss.backward()
    for name, parameter in trainer.model.named_parameters():
        trained = name.startswith("heads.") or trunk == "full" or ".lora_" in name
        assert (parameter.grad is not None and parameter.grad.any().item()) == trained, name


def test_the_frozen_trunk_gets_none(tiny_base, texts, tmp_path):
    trainer = trainer_of(tiny_base, texts, tmp_path / "ee", head="adapter")
    trainer._on_model(trainer.training_step, first_batch(trainer)).loss.backward()
    assert all(parameter.grad is None for parameter in trainer.model.hf.parameters())
    ups = [head.adapter.up.weight.grad for head in trainer.model.heads.values()]
    assert all(gradient.any() for gradient in ups)


def test_a_skipped_layer_does_not_run(tiny_base, texts, tmp_path):
    """Rows that reach each layer, counted on the layers themselves, are those of the schedule."""
    trainer = trainer_of(
        *(tiny_base, texts, tmp_path / "ee"),
        **dict(trunk="full", head="shared", layer_dropout=0.5, dropout_schedule="linear"),
    )
    layers = trainer.model.num_layers
    ran = [0] * layers
    for i, layer in enumerate(trainer.model.hf.model.layers):
        layer.register_forward_pre_hook(
            lambda module, args, i=i: ran.__setitem__(i, ran[i] + len(args[0]))
        )
    batches, steps = trainer._batches(), 60
    for step in range(steps):
        with torch.no_grad():
            trainer._on_model(trainer.training_step, Batch.of(next(batches), step))
    rows = steps * trainer.recipe.batch_size
    for i in range(layers):
        expected = 1 - 0.5 * i / (layers - 1)
        assert ran[i] / rows == pytest.approx(expected, abs=0.1), i
    assert ran[0] == rows


def test_gradient_checkpointing_changes_no_gradient(tiny_base, texts, tmp_path):
    found = []
    for again in (False, True):
        trainer = trainer_of(
            *(tiny_base, texts, tmp_path / "ee"),
            **dict(trunk="full", head="shared", layer_dropout=0.3, gradient_checkpointing=again),
        )
        trainer._on_model(trainer.training_step, first_batch(trainer)).loss.backward()
        found.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, kept)


@pytest.mark.parametrize("again", [False, True])
def test_the_mask_of_packed_rows_is_built_once_per_pass(
    tiny_base, texts, tmp_path, monkeypatch, again
):
    """Not in every layer, though layers run one by one: some rows skip some, and with gradient
    checkpointing they run twice."""
    from hispec.models import layer_inputs

    built, build = [], layer_inputs.additive_mask
    monkeypatch.setattr(
        layer_inputs, "additive_mask", lambda *a, **k: (built.append(1), build(*a, **k))[1]
    )
    trainer = trainer_of(
        *(tiny_base, texts, tmp_path / "ee"),
        **dict(trunk="full", head="shared", layer_dropout=0.5, gradient_checkpointing=again),
        **dict(seq_len=256, dropout_schedule="uniform", batch_size=8),
    )
    batches = trainer._batches()
    batch = next(
        b for step in range(9) if (b := Batch.of(next(batches), step)).positions_BT is not None
    )
    trainer._on_model(trainer.training_step, batch).loss.backward()
    assert len(built) == 1


@pytest.mark.parametrize("trunk", ["lora", "full"])
def test_a_trained_trunk_is_exported_with_what_it_learned(tiny_base, texts, tmp_path, trunk):
    """Plain transformers and `load` read the model that was trained, to float32's rounding."""
    trainer = trainer_of(
        *(tiny_base, texts, tmp_path / "ee"),
        **dict(trunk=trunk, head="block", lr=0.01, steps=6, eval_every=6),
    )
    trainer.train()
    rows_RT = trainer.evaluator.rows.tokens_RT
    with torch.no_grad():
        trained = trainer.model.hf(rows_RT).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ee")(rows_RT).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_base)(rows_RT).logits
        model, _ = checkpoint.load_checkpoint(tmp_path / "ee")
        torch.testing.assert_close(model.hf(rows_RT).logits, plain)
    torch.testing.assert_close(plain, trained, rtol=1e-4, atol=1e-4)
    assert (plain - base).abs().max() > 0.1
    config = checkpoint.read_config(tmp_path / "ee")
    assert config["base"]["trained"]
    assert config["base"]["included"]
    assert config["figures"]["drift"] > 0
    card = (tmp_path / "ee" / "README.md").read_text()
    assert "that text is no longer the base's" in card
    assert "KL of the full model to its base" in card
    with pytest.raises(ValueError, match="was trained too: use --full"):
        export(tmp_path / "ee", tmp_path / "light", full=False)
    export(tmp_path / "ee", tmp_path / "again", full=True)
    again, _ = checkpoint.load_checkpoint(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again.hf(rows_RT).logits, plain)


def test_drift_is_the_kl_to_the_base(tiny_base, texts, tmp_path):
    """Zero before the first step, and afterwards what two plain models give each document alone."""
    trainer = trainer_of(
        *(tiny_base, texts, tmp_path / "ee"),
        **dict(trunk="full", head="shared", lr=0.01, steps=6, eval_every=6),
        **dict(seq_len=128, eval_sequences=99),  # all rows: one of them has a border
    )
    trainer.train()
    assert trainer.history[0]["drift"] == pytest.approx(0, abs=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    texts = [text for row in documents_of(trainer.evaluator.rows) for text in row]
    assert len(texts) > len(trainer.evaluator.rows)
    kl = []
    with torch.no_grad():
        for text_1T in texts:
            log_p = base(text_1T).logits.log_softmax(-1)
            log_q = trainer.model.hf(text_1T).logits.log_softmax(-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
    expected = torch.cat(kl).mean().item()
    assert trainer.history[-1]["drift"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


@pytest.mark.parametrize("trunk", ["lora", "full"])
def test_base_kl_holds_the_trunk_back(tiny_base, texts, tmp_path, trunk):
    drift = {}
    for weight in (0.0, 10.0):
        trainer = trainer_of(
            *(tiny_base, texts, tmp_path / f"ee{weight}"),
            **dict(trunk=trunk, head="shared", lr=0.01, base_kl=weight, eval_every=12),
        )
        trainer.train()
        drift[weight] = trainer.history[-1]["drift"]
    assert drift[10.0] < 0.5 * drift[0.0]


def test_a_trunk_that_drifts_too_far_is_stopped_and_the_best_kept(tiny_base, texts, tmp_path):
    words = dict(trunk="full", head="shared", lr=0.02, steps=40, eval_every=2, warmup=0.5)
    free = trainer_of(tiny_base, texts, tmp_path / "free", **words)
    free.train()
    limit = free.history[3]["drift"]  # after six steps
    bounded = trainer_of(tiny_base, texts, tmp_path / "ee", max_drift=limit, **words)
    bounded.train()
    assert bounded.step < 40
    assert bounded.history[-1]["drift"] > limit
    assert 0 < checkpoint.read_config(tmp_path / "ee")["figures"]["drift"] <= limit


def test_no_checkpoint_within_the_drift_is_said(tiny_base, texts, tmp_path):
    trainer = trainer_of(
        *(tiny_base, texts, tmp_path / "ee"),
        **dict(trunk="full", head="shared", lr=0.02, max_drift=1e-9),
    )
    with pytest.raises(ValueError, match="max_drift=1e-09: the full model was further"):
        trainer.train()
    assert not (tmp_path / "ee").exists()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tiny_base, texts, tmp_path):
    """Layer dropout, a curriculum, accumulated gradients, all weights: losses equal to 1e-6."""
    words = dict(
        **dict(trunk="full", head="block", layer_dropout=0.3, curriculum="gradual"),
        **dict(accumulate=2, batch_size=2, save_every=4, eval_every=3),
    )
    whole = trainer_of(tiny_base, texts, tmp_path / "whole", **words)
    whole.train()
    broken = trainer_of(tiny_base, texts, tmp_path / "ee", **words)
    train_to(broken, 7)
    resumed = trainer_of(tiny_base, texts, tmp_path / "ee", **words)
    resumed.train()
    assert [e["step"] for e in resumed.history] == [e["step"] for e in whole.history]
    for entry, expected in zip(resumed.history, whole.history, strict=True):
        assert entry.get("training") == pytest.approx(expected.get("training"), abs=1e-6)
        assert entry["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for got, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_accumulated_passes_equal_one_large_one(tiny_base, texts, tmp_path):
    ends = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        trainer = trainer_of(
            *(tiny_base, texts, tmp_path / f"ee{accumulate}"),
            **dict(batch_size=batch_size, accumulate=accumulate, steps=3, eval_every=3),
        )
        trainer.train()
        ends.append(trainer.history[-1]["agreement"][0]["acceptance"])
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


def test_a_state_holds_what_is_trained_and_nothing_else(tiny_base, texts, tmp_path):
    """LoRA adapters and exits; the weights of the base are on disk already."""
    from safetensors.torch import load_file

    words = dict(trunk="lora", steps=4, save_every=4, eval_every=4, lr=0.01)
    trainer = trainer_of(tiny_base, texts, tmp_path / "ee", **words)
    trained = {n for n, p in trainer.wrapped.named_parameters() if p.requires_grad}
    trainer.train()
    state = load_file(tmp_path / "ee.run" / "state" / "model.safetensors")
    assert set(state) == trained
    again = trainer_of(tiny_base, texts, tmp_path / "ee", **words)
    again._resume()
    assert again.step == 4
    for got, wanted in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_a_tied_lm_head_is_saved_resumed_and_exported_once(texts, tmp_path):
    from conftest import tiny_hf, tiny_tokenizer
    from safetensors.torch import load_file

    base = tmp_path / "tied"
    tiny_hf(vocab_size=320, tie_word_embeddings=True).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    words = dict(trunk="full", head="shared", lr=0.01, steps=8, save_every=4, eval_every=8)
    trainer = trainer_of(base, texts, tmp_path / "ee", **words)
    trainer.train()
    again = trainer_of(base, texts, tmp_path / "ee", **words)
    again._resume()
    assert again.step == 8
    for got, wanted in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(got, wanted)
    assert "lm_head.weight" not in load_file(tmp_path / "ee" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ee")
    assert torch.equal(plain.lm_head.weight, trainer.model.hf.model.embed_tokens.weight)
