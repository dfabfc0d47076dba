"""Packed documents: each is computed, taught and measured as if it were alone."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB, documents_of, tiny_model, tiny_tokenizer
from test_trainer import settings

from hispec.checkpoint import io as checkpoint
from hispec.data.documents import Document
from hispec.data.packing import (
    Rows,
    evenly_spaced,
    next_tokens,
    packed,
    positions_if_packed,
    windows,
)
from hispec.metrics.agreement import LONGEST_RUN
from hispec.models.architectures import SLIDING
from train.data import TrainingRows
from train.evaluator import Evaluator
from train.recipe import Recipe, load_recipe
from train.trainer import Trainer
from train.training_step import Batch, TrainingStep
from train.trunk import Trunk

LENGTHS = [(5, 1, 13), (19,), (2, 17)]
SLIDES = ("gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "smollm3")  # windows of 7 tokens


def rows_of(lengths=LENGTHS) -> Rows:
    """A row of random documents for every tuple of lengths."""
    generator = torch.Generator().manual_seed(2)
    parts = [
        torch.randint(3, VOCAB, (n,), generator=generator).tolist() for r in lengths for n in r
    ]
    return packed([(ids, [True] * len(ids)) for ids in parts], sum(lengths[0]), len(lengths))


def test_rows_carry_the_places_of_their_tokens():
    rows = packed([([7] * 3, [True] * 3), ([8] * 5, [False] * 5), ([9] * 4, [True] * 4)], 5, 2)
    assert rows.tokens_RT.tolist() == [[7, 7, 7, 8, 8], [8, 8, 8, 9, 9]]
    assert rows.positions_RT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert rows.loss_mask_RT.tolist() == [[True] * 3 + [False] * 2, [False] * 3 + [True] * 2]
    whole = Rows.whole(rows.tokens_RT)
    assert whole.positions_RT.tolist() == [list(range(5))] * 2
    assert positions_if_packed(whole.positions_RT) is None
    assert positions_if_packed(rows.positions_RT) is rows.positions_RT


def test_windows_join_documents_with_eos():
    tokenizer = tiny_tokenizer()
    found = [Document("a", "import os\n" * 9), Document("b", "def f():\n    return 1\n" * 9)]
    rows = windows(found, tokenizer, 7)
    stream = rows.tokens_RT.flatten().tolist()
    first = tokenizer(found[0].text)["input_ids"]
    assert stream[: len(first) + 1] == [*first, tokenizer.eos_token_id]
    begins = (rows.positions_RT.flatten() == 0).nonzero().flatten().tolist()
    assert set(begins) == {*range(0, len(stream), 7), len(first) + 1}
    assert torch.equal(windows(found, tokenizer, 7, most=2).tokens_RT, rows.tokens_RT[:2])
    with pytest.raises(ValueError, match="do not fill one row of 10000"):
        windows(found, tokenizer, 10000)


def test_no_more_documents_are_read_than_the_rows_need():
    read = []

    def lazily():
        for i in range(1000):
            read.append(i)
            yield Document(str(i), "import os\n" * 9)

    assert len(windows(lazily(), tiny_tokenizer(), 7, most=3)) == 3
    assert len(read) <= 64


def test_evenly_spaced_rows_reach_both_ends():
    rows = Rows.whole(torch.arange(10)[:, None])
    assert evenly_spaced(rows, 4).tokens_RT.flatten().tolist() == [0, 3, 6, 9]
    assert evenly_spaced(rows, 99).tokens_RT.flatten().tolist() == list(range(10))


def test_labels_do_not_cross_a_border():
    rows = rows_of([(2, 3)])
    tokens = rows.tokens_RT[0].tolist()
    batch = TrainingRows(rows)[:]
    assert batch["labels"].tolist() == [[tokens[1], -100, tokens[3], tokens[4], -100]]
    assert torch.equal(batch["positions"], rows.positions_RT)


@torch.inference_mode()
def test_a_packed_row_gives_what_its_documents_give_alone(family):
    """States at every depth, the final logits and those of trained blocks; sliding windows too."""
    model, rows = tiny_model(family, exits=(2, 4)), rows_of()
    assert (SLIDING in model.layer_types) == (family in SLIDES)
    hidden, texts = model.embed(rows.tokens_RT), documents_of(rows)
    alone = [[model.embed(text) for text in row] for row in texts]
    for depth in range(1, 7):
        hidden = model.run(hidden, depth - 1, depth, rows.positions_RT)
        alone = [[model.run(text, depth - 1, depth) for text in row] for row in alone]
        assert_same(hidden, joined(alone))
    hidden, alone = model.embed(rows.tokens_RT), [[model.embed(t) for t in row] for row in texts]
    for shallow, depth in ((0, 2), (2, 4), (4, 6)):
        hidden = model.run(hidden, shallow, depth, rows.positions_RT)
        alone = [[model.run(text, shallow, depth) for text in row] for row in alone]
        logits = model.logits(depth, hidden, rows.positions_RT)
        expected = joined([[model.logits(depth, text) for text in row] for row in alone])
        assert_same(logits, expected)
        head = model.run_head(depth, hidden, rows.positions_RT)
        own = joined([[model.run_head(depth, text) for text in row] for row in alone])
        assert_same(head, own)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest number: other shapes are summed up in another order."""
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def joined(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """Rows of documents [1, T, X] one after another, [R, T, X]."""
    return torch.cat([torch.cat(row, dim=1) for row in rows])


@torch.inference_mode()
def test_without_positions_documents_would_see_each_other(family):
    """What the mask is for: the same rows as whole sequences differ, from the border on."""
    model, rows = tiny_model(family, exits=(2,)), rows_of()
    masked = model.final(rows.tokens_RT, rows.positions_RT)
    whole = model.final(rows.tokens_RT)
    torch.testing.assert_close(masked[:, :2], whole[:, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(masked[1], whole[1], rtol=0, atol=1e-5)  # one document
    assert (masked[0, 5:] - whole[0, 5:]).abs().max() > 0.01
    states = model.run(model.embed(rows.tokens_RT), 0, 2, rows.positions_RT)
    head = model.run_head(2, states, rows.positions_RT)
    assert (head - model.run_head(2, states))[0, 5:].abs().max() > 0.01


@torch.inference_mode()
def test_transformers_packs_by_positions_alike():
    """An independent reading: transformers' own mask for position ids that start anew."""
    model, rows = tiny_model("llama"), rows_of()
    theirs = model.hf(rows.tokens_RT, position_ids=rows.positions_RT, use_cache=False).logits
    ours = model.project(model.final(rows.tokens_RT, rows.positions_RT))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_evaluator_measures_each_document_on_its_own(family):
    """Agreement, acceptance, runs, loss and drift of packed rows, and of the documents alone."""
    model, rows = tiny_model(family, exits=(2, 4), head="block"), rows_of([(9, 10), (12, 7)])
    trunk = SimpleNamespace(trained=True)
    alone = [
        evaluated(model, Rows.whole(text), trunk) for row in documents_of(rows) for text in row
    ]
    packed_rows = evaluated(model, rows, trunk)
    tokens = [9, 10, 12, 7]
    labels = [n - 1 for n in tokens]

    def mean(values, weights):
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    assert packed_rows["loss"] == pytest.approx(mean([f["loss"] for f in alone], labels), abs=1e-5)
    assert packed_rows["drift"] == pytest.approx(
        mean([f["drift"] for f in alone], tokens), abs=1e-5
    )
    assert packed_rows["drift"] > 0.01
    for i, pair in enumerate(packed_rows["agreement"]):
        for key in ("top1", "acceptance"):
            expected = mean([f["agreement"][i][key] for f in alone], tokens)
            assert pair[key] == pytest.approx(expected, abs=1e-5)
        starts = [max(0, n - LONGEST_RUN + 1) for n in tokens]  # the last is too short for any
        assert starts[-1] == 0
        for k, share in enumerate(pair["runs"]):
            runs = [f["agreement"][i]["runs"][k] for f in alone[:3]]
            assert share == pytest.approx(mean(runs, starts[:3]), abs=1e-6)
    whole = evaluated(model, Rows.whole(rows.tokens_RT), trunk)
    assert abs(whole["loss"] - packed_rows["loss"]) > 1e-3


def evaluated(model, rows: Rows, trunk) -> dict:
    """What the evaluator finds after the trunk has moved a little and back again."""
    evaluator = Evaluator(rows, trunk)
    weight = model.hf.model.layers[3].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.neg_()
        evaluator.remember_base(model)
        weight.copy_(kept)
    return evaluator(model)


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_loss_and_gradients_of_packed_rows_are_those_of_the_documents(family, again, rate):
    """Trained trunk, block heads, layer dropout, recomputation, the base's KL: all packed.

    Each document runs as a row of its own, skips the layers that its packed row skips, and adds to
    the loss by its labels.
    """
    recipe = Recipe(
        *("-", "-", [2, 4]),
        **dict(trunk="full", layer_dropout=rate, gradient_checkpointing=again, base_kl=0.5),
    )
    rows = rows_of([(9, 10), (12, 7), (19,)])
    found = {}
    for kind in ("packed", "alone", "whole"):
        model = tiny_model(family, exits=(2, 4))
        base = tiny_model(family, seed=1)
        step = TrainingStep(recipe, Trunk(model.hf, "full", rank=1, alpha=1.0), base)
        if kind == "alone":
            loss = sum(
                count * step_on_document(step, model, text, row, rows).loss
                for row, texts in enumerate(documents_of(rows))
                for text in texts
                if (count := text.shape[1] - 1)
            ) / sum(n - 1 for n in (9, 10, 12, 7, 19))
        else:
            taken = rows if kind == "packed" else Rows.whole(rows.tokens_RT)
            labels = next_tokens(rows.tokens_RT, positions_RT=rows.positions_RT)
            batch = Batch.of({**TrainingRows(taken)[:], "labels": labels}, 0)
            loss = step(model, batch).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found[kind] = loss.item(), torch.cat([g.flatten() for g in grads])
    assert math.isclose(found["packed"][0], found["alone"][0], rel_tol=1e-5)
    torch.testing.assert_close(found["packed"][1], found["alone"][1], rtol=1e-3, atol=1e-5)
    assert abs(found["packed"][0] - found["whole"][0]) > 1e-3


def step_on_document(step: TrainingStep, model, text_1T, row: int, rows: Rows):
    """One document as a row of its own, with the layers that its packed row skips."""
    padded = torch.full_like(rows.tokens_RT[:1], 3)
    padded[:, : text_1T.shape[1]] = text_1T
    labels = torch.full_like(padded, -100)
    labels[:, : text_1T.shape[1] - 1] = text_1T[:, 1:]
    tokens_BT = padded.expand(len(rows), -1)
    labels_BT = torch.full_like(rows.tokens_RT, -100)
    labels_BT[row] = labels[0]  # the other rows of the batch teach nothing
    return step(model, Batch(tokens_BT, labels_BT, 0))


@pytest.mark.parametrize("trunk", ["frozen", "lora", "full"])
def test_every_kind_of_trunk_trains_on_packed_rows(tiny_base, tmp_path, trunk):
    """Short documents, so that every row has borders: the loss falls, the checkpoint is there."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n")
    words = settings(
        *(tiny_base, texts, tmp_path / "ee"),
        **dict(trunk=trunk, steps=30, eval_every=15, lr=0.003, head_blocks=1),
    )
    trainer = Trainer(load_recipe(words))
    assert positions_if_packed(trainer.evaluator.rows.positions_RT) is not None
    assert positions_if_packed(next(trainer._batches())["positions"]) is not None
    trainer.train()
    before, after = trainer.history[0], trainer.history[-1]
    assert after["agreement"][0]["acceptance"] > before["agreement"][0]["acceptance"]
    assert checkpoint.read_config(tmp_path / "ee")["recipe"] == asdict(trainer.recipe)
