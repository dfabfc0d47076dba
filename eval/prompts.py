"""Prompts to decode: of a set, a JSONL file, or the beginnings of held-out documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eval.prompt_sets import task_prompts
from hispec.checkpoint.format import is_checkpoint, read_config
from hispec.data.documents import STDLIB, Document, documents, held_out_stream, split
from hispec.data.packing import Rows, evenly_spaced, windows
from hispec.data.prompts import spread
from hispec.lm import EarlyExitLM
from hispec.utils.settings import check

HELD_OUT = "held-out"


@dataclass
class TextSource:
    """Held-out text. What is None is taken from the recipe of the checkpoint, so that nothing that
    it was trained on is measured on; without a recipe it is the standard library."""

    data: str | None = None
    """`stdlib`, a local file or folder, or a Hub dataset id."""
    data_split: str | None = None
    text_column: str | None = None
    held_out: float | None = None
    """Share of the documents that is held out."""
    streaming: bool | None = None
    """Read no more of `data` than is needed. The documents held out are others than those of a text
    read at once."""


def held_out_documents(
    source: TextSource, checkpoint: str
) -> tuple[str, list[Document] | Iterator[Document]]:
    """(name of the source, its held-out documents).

    All of them, or, of a streamed text, an iterator that reads on as it is asked for more.
    """
    folder = Path(checkpoint)
    recipe = read_config(folder)["recipe"] if is_checkpoint(folder) else {}
    defaults = {
        **{"data": STDLIB, "data_split": "train", "text_column": "text", "held_out": 0.05},
        **{"streaming": False},  # as in recipes from before there was the key
    }
    keys = {
        key: recipe.get(key, default) if getattr(source, key) is None else getattr(source, key)
        for key, default in defaults.items()
    }
    check(0 < keys["held_out"] < 1, "held_out", keys["held_out"], "above 0, below 1")
    text = keys["data"], keys["text_column"], keys["data_split"]
    if keys["streaming"]:
        return keys["data"], held_out_stream(*text, keys["held_out"])
    return keys["data"], split(documents(*text), keys["held_out"])[1]


def held_out_rows(
    source: TextSource, checkpoint: str, lm: EarlyExitLM, seq_len: int, sequences: int
) -> tuple[str, Rows]:
    """(name of the source, rows of `seq_len` tokens of its held-out documents)."""
    name, held_out = held_out_documents(source, checkpoint)
    # A stream gives its first rows, as in training; of a text read at once they are spread out.
    most = None if isinstance(held_out, list) else sequences
    found = windows(held_out, lm.tokenizer, seq_len, most, f"held-out text ({name})")
    return name, evenly_spaced(found, sequences)


def beginnings(
    lm: EarlyExitLM, source: TextSource, checkpoint: str, *, count: int, tokens: int, room: int
) -> list[list[int]]:
    """The first `tokens` tokens of held-out documents that go on for at least `room` more.

    Raises:
        ValueError: no document is that long.
    """
    found: list[list[int]] = []
    name, held_out = held_out_documents(source, checkpoint)
    for document in held_out:
        ids = lm.tokenizer(document.text, verbose=False)["input_ids"]
        if len(ids) >= tokens + room:
            found.append(ids[:tokens])
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"no held-out document of {name!r} has {tokens + room} tokens or more")
    return found


@dataclass
class Asked:
    """One prompt as the model gets it."""

    task: str
    tokens: list[int]


@dataclass
class PromptSource(TextSource):
    """Prompts to decode."""

    prompts_from: str = HELD_OUT
    """`held-out`: the beginnings of held-out documents; `builtin`: a set of our own; `spec-bench`,
    `humaneval`, `gsm8k`, `cnn-dm`, `xsum`, `sharegpt`; or a local JSONL file, of such rows or as in
    `hispec.prompts.to_prompt`."""
    prompts: int = 6
    """Spread evenly over the tasks of a set."""
    chat: bool | None = None
    """Put prompts in the chat template, or in none; default: questions where there is one."""
    prompt_tokens: int = 64
    """Length of a beginning."""
    max_new_tokens: int = 64


def load_prompts(lm: EarlyExitLM, source: PromptSource, checkpoint: str) -> list[Asked]:
    """The prompts that `source` names, task after task.

    Raises:
        ValueError: an impossible number, an unreadable set, or no document that is long enough.
    """
    for key in ("prompts", "prompt_tokens", "max_new_tokens"):
        check(getattr(source, key) >= 1, key, getattr(source, key), "1 or more")
    if source.prompts_from != HELD_OUT:
        taken = spread(task_prompts(source.prompts_from), source.prompts)
        return [Asked(p.task, p.encode(lm.tokenizer, source.chat)) for p in taken]
    check(not source.chat, "chat", source.chat, f"prompts_from={HELD_OUT!r} has texts to continue")
    found = beginnings(
        lm,
        source,
        checkpoint,
        count=source.prompts,
        tokens=source.prompt_tokens,
        room=source.max_new_tokens,
    )
    return [Asked(HELD_OUT, tokens) for tokens in found]
