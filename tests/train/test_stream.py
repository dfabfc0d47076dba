"""Text read as it is needed: the same rows from every position, and none of them held out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from functools import cache

import pytest
import torch
from conftest import (
    LAUNCH,
    TRAIN,
    documents_of,
    history,
    run,
    tiny_tokenizer,
    write_jsonl,
)
from killing import kill_when
from test_trainer import exits_of, settings, train_to

from hispec.checkpoint import io as checkpoint
from hispec.data.documents import (
    Document,
    documents,
    held_out_stream,
    is_held_out,
)
from hispec.data.packing import windows
from train.recipe import Recipe, load_recipe
from train.stream import Position, RowStream, streamed_sets
from train.trainer import Trainer

LONG = 7  # of the documents below: longer than a block


def some_documents() -> list[Document]:
    """Twenty documents of one to forty tokens and one of several blocks."""
    texts = [f"x{i} = {i}\n" * (i % 6 + 1) for i in range(20)]
    texts[LONG] *= 30
    return [Document(str(i), text) for i, text in enumerate(texts)]


class Source:
    """Counts what is read."""

    def __init__(self, found: list[Document]) -> None:
        self.found = found
        self.read: list[int] = []

    def __call__(self, skip: int):
        for i in range(skip, len(self.found)):
            self.read.append(i)
            yield self.found[i]


def stream_of(found=None, seq_len=8, block_rows=6, seed=0, share=0.2) -> RowStream:
    return RowStream(
        Source(some_documents() if found is None else found),
        tiny_tokenizer_once(),
        seq_len,
        is_left_out=lambda document: is_held_out(document, share),
        block_rows=block_rows,
        seed=seed,
        name="data='x'",
    )


tiny_tokenizer_once = cache(tiny_tokenizer)


def rows_per_epoch(seq_len=8) -> int:
    kept = [d for d in some_documents() if not is_held_out(d, 0.2)]
    return len(windows(kept, tiny_tokenizer_once(), seq_len))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_an_epoch_brings_the_rows_of_the_text_in_another_order():
    """Each row once, those that `windows` packs; blocks after each other; epochs unlike."""
    kept = [d for d in some_documents() if not is_held_out(d, 0.2)]
    assert 0 < len(kept) < 20
    expected = windows(kept, tiny_tokenizer_once(), 8)
    stream, count = stream_of(), len(expected)
    epochs = [stream.take(count) for _ in range(3)]
    key = lambda rows, r: (*rows.tokens_RT[r].tolist(), *rows.positions_RT[r].tolist())  # noqa: E731
    wanted = [key(expected, r) for r in range(count)]
    for rows in epochs:
        got = [key(rows, r) for r in range(count)]
        assert Counter(got) == Counter(wanted)
        for start in range(0, count, 6):
            block = slice(start, start + 6)
            assert Counter(got[block]) == Counter(wanted[block])
        assert got != wanted
        assert all(rows.loss_mask_RT.flatten().tolist())
    assert not same(epochs[0], epochs[1])
    assert not same(epochs[1], epochs[2])
    assert not same(stream_of(seed=1).take(count), epochs[0])
    assert stream.position.epoch == 2


def test_the_same_rows_after_a_resume_at_every_position():
    """Over two epoch borders, through JSON, from streams that read only what they must."""
    stream, count = stream_of(), 2 * rows_per_epoch() + 9
    positions, rows = [], []
    for _ in range(count):
        positions.append(json.dumps(asdict(stream.position)))
        rows.append(stream.take(1))
    assert {json.loads(p)["epoch"] for p in positions} == {0, 1, 2}
    assert any(json.loads(p)["token"] > 0 for p in positions)
    for i in range(count):
        resumed = stream_of()
        resumed.seek(Position(**json.loads(positions[i])))
        for expected in rows[i : i + 15]:
            assert same(resumed.take(1), expected), (i, positions[i])


def test_a_resumed_stream_skips_what_lies_before_its_block():
    stream = stream_of(block_rows=2, share=1e-9)
    stream.take(rows_per_epoch() - 1)
    position = stream.position
    assert position.document >= LONG
    resumed = stream_of(block_rows=2, share=1e-9)
    resumed.seek(position)
    resumed.take(1)
    assert min(resumed._read.read) == position.document


def test_taking_many_rows_is_taking_each():
    one, many = stream_of(), stream_of()
    for size in (1, 5, 6, 13, 40):
        rows = many.take(size)
        for r in range(size):
            assert same(one.take(1), rows[r : r + 1])
        assert same(one.take(1), many.take(1))


def test_held_out_documents_are_never_trained_on():
    marked = [Document(str(i), f"@{i:03d}@ " * 9) for i in range(200)]
    assert 20 < sum(is_held_out(d, 0.2) for d in marked) < 60
    stream = stream_of(marked, seq_len=16)
    rows = stream.take(1200).tokens_RT.tolist()
    text = "|".join(tiny_tokenizer_once().decode(row) for row in rows)
    assert stream.position.epoch >= 1
    for document in marked:
        name = document.text.split()[0]
        assert (name in text) == (not is_held_out(document, 0.2)), name


def test_the_hold_out_depends_on_the_text_alone():
    chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    shares = [0.01 * i for i in range(1, 100)]
    for one, other in (
        (Document("a", "same"), Document("b", "same")),
        (Document("a", "", chat), Document("b", "", tuple(dict(m) for m in chat))),
    ):
        assert [is_held_out(one, s) for s in shares] == [is_held_out(other, s) for s in shares]
    found = [is_held_out(Document("", f"text {i}"), 0.25) for i in range(4000)]
    assert sum(found) / 4000 == pytest.approx(0.25, abs=0.03)
    assert is_held_out(Document("", "\ud800"), 1 - 1e-9)  # half a pair, as JSON may bring it


def test_a_stream_without_a_row_is_refused():
    with pytest.raises(
        ValueError, match=r"data='x': the stream ended after \d+ tokens .* of 100000"
    ):
        stream_of(seq_len=100_000).take(1)
    with pytest.raises(ValueError, match="ended after 0 tokens"):
        stream_of([]).take(1)


# Runs ---------------------------------------------------------------------------------------------

STREAM = dict(streaming="true", held_out=0.2, eval_sequences=2)


def recipe_of(data, **changes) -> Recipe:
    words = {"base": "-", "output": "-", "exits": [2], "data": str(data), "seq_len": 16, **changes}
    recipe = Recipe(**{"streaming": True, "held_out": 0.2, **words})
    recipe.validate()
    return recipe


def test_the_sets_of_a_recipe(texts, tmp_path):
    tokenizer = tiny_tokenizer_once()
    stream, held_out = streamed_sets(recipe_of(texts, eval_sequences=3), tokenizer)
    first = next(held_out_stream(str(texts), "text", "train", 0.2))
    assert len(held_out) == 3
    assert held_out.tokens_RT[0].tolist() == tokenizer(first.text)["input_ids"][:16]
    assert stream._block_rows == 4000  # what the run needs, if that is less than a block
    write_jsonl(tmp_path / "a.jsonl", ["x"] * 9)
    for share in (1e-9, 1 - 1e-9):
        recipe = recipe_of(tmp_path / "a.jsonl", text_column="body", held_out=share)
        with pytest.raises(ValueError, match=r"a\.jsonl.* fill one row of 16"):
            streamed_sets(recipe, tokenizer)[0].take(1)


def test_processes_share_the_rows_of_a_pass(tiny_base, texts, tmp_path, monkeypatch):
    """Two of them have, together and in order, what one has with the same global batch."""
    words = settings(tiny_base, texts, tmp_path / "ee", **STREAM)
    trainer = Trainer(load_recipe(words))
    trainer.recipe.batch_size = 6
    alone = trainer._batches()
    expected = [next(alone) for _ in range(5)]
    shares = []
    for process in (0, 1):
        of_two = Trainer(load_recipe(words))
        of_two.recipe.batch_size = 3
        state = of_two.accelerator.state
        monkeypatch.setitem(state._shared_state, "num_processes", 2)
        monkeypatch.setitem(state._shared_state, "process_index", process)
        batches = of_two._batches()
        shares.append([next(batches) for _ in range(5)])
        monkeypatch.undo()
    for whole, first, second in zip(expected, *shares, strict=True):
        for name, tensor in whole.items():
            assert torch.equal(tensor, torch.cat([first[name], second[name]]))


def test_a_run_on_a_hub_dataset_resumes_in_mid_epoch(hub_dataset, tiny_base, tmp_path):
    """In one process, over epoch borders: losses and weights of a run that was not interrupted."""
    words = dict(
        **dict(data="org/set", text_column="body", streaming="true", held_out=0.2),
        **dict(
            trunk="full", layer_dropout=0.3, accumulate=2, batch_size=16, eval_every=3, steps=10
        ),
    )
    whole = Trainer(load_recipe(settings(tiny_base, "-", tmp_path / "whole", **words)))
    whole.train()
    assert whole.stream.position.epoch >= 1
    broken = Trainer(load_recipe(settings(tiny_base, "-", tmp_path / "ee", **words)))
    train_to(broken, 7)
    resumed = Trainer(load_recipe(settings(tiny_base, "-", tmp_path / "ee", **words)))
    resumed.train()
    assert [e["step"] for e in resumed.history] == [0, 3, 6, 9, 10]
    for entry, expected in zip(resumed.history, whole.history, strict=True):
        assert entry.get("training") == pytest.approx(expected.get("training"), abs=1e-6)
        assert entry["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for got, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.fixture(scope="module")
def finished(tiny_base, texts, tmp_path_factory):
    """An uninterrupted run through `accelerate launch`."""
    output = tmp_path_factory.mktemp("run") / "ee"
    done = run(*TRAIN, *settings(tiny_base, texts, output, **STREAM))
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(finished, tiny_base, texts, tmp_path):
    output = tmp_path / "ee"
    words = settings(tiny_base, texts, output, **STREAM)
    progress = tmp_path / "ee.run" / "state" / "progress.json"
    kill_when(progress.exists, *LAUNCH, *words)
    saved = json.loads(progress.read_text())
    assert saved["stream"]["row"] == saved["step"] * 4
    resumed = run(*TRAIN, *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on at step " in resumed.stdout
    expected, got = exits_of(finished), exits_of(output)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)
    histories = [history(folder) for folder in (output, finished)]
    assert [entry["step"] for entry in histories[0]] == [0, 6, 12]
    for entry, wanted in zip(*histories, strict=True):
        assert entry["agreement"] == wanted["agreement"]
        assert entry.get("training") == pytest.approx(wanted.get("training"), abs=1e-6)


@pytest.mark.slow
def test_what_is_measured_was_held_out(finished, texts):
    """`eval/agreement.py` follows the recipe of the checkpoint."""
    from eval.prompts import TextSource, held_out_documents

    assert checkpoint.read_config(finished)["recipe"]["streaming"]
    name, found = held_out_documents(TextSource(), str(finished))
    held_out = list(found)
    assert name == str(texts)
    assert held_out == [d for d in documents(str(texts)) if is_held_out(d, 0.2)]
    done = run(
        *(sys.executable, "eval/agreement.py", f"checkpoint={finished}"),
        *("seq_len=32", "sequences=2", f"output={finished.parent / 'eval'}"),
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    measured = json.loads(line)["agreement"]
    figures = checkpoint.read_config(finished)["figures"]["agreement"]
    for got, expected in zip(measured, figures, strict=True):  # the evaluator's own rows
        assert got["top1"] == pytest.approx(expected["top1"], abs=1e-6)
        assert got["acceptance"] == pytest.approx(expected["acceptance"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "body"}, "text_column='body'"),
        ({"data": "/no/such/text"}, "data='/no/such/text'"),
        ({"held_out": 0.000001}, "0 tokens of the held-out documents (held_out=1e-06)"),
        ({"seq_len": 1_000_000}, "do not fill one row of 1000000"),
    ],
)
def test_the_command_refuses_with_exit_code_2(tiny_base, texts, tmp_path, changes, message):
    words = settings(tiny_base, texts, tmp_path / "ee", **{**STREAM, **changes})
    done = run(sys.executable, "train/ee_finetune.py", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_borders_of_streamed_rows_are_those_of_documents():
    """Whole documents lie between borders, but at the edges of a row."""
    tokenizer = tiny_tokenizer_once()
    kept = [d for d in some_documents() if not is_held_out(d, 0.2)]
    ends = {tuple([*tokenizer(d.text)["input_ids"], tokenizer.eos_token_id]) for d in kept}
    rows = stream_of(seq_len=64).take(rows_per_epoch(64))
    inner = [tuple(text[0].tolist()) for row in documents_of(rows) for text in row[1:-1]]
    assert inner
    assert set(inner) <= ends
