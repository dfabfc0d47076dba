"""Prompts to decode: lines of a JSONL file, or the beginnings of held-out documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hispec.checkpoint import is_checkpoint, read_config
from hispec.config import check
from hispec.lm import EarlyExitLM
from hispec.prompts import read_prompts, spread
from hispec.text import STDLIB, Document, documents, held_out_stream, split


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


def from_file(lm: EarlyExitLM, path: Path, count: int) -> list[list[int]]:
    """`count` prompts of a JSONL file, spread evenly over its tasks.

    Questions are asked in the chat template where there is one, see `hispec.prompts`.

    Raises:
        ValueError: a row that is no prompt, or no prompts at all.
    """
    taken = spread(read_prompts(path), count)
    if not taken:
        raise ValueError(f"{path} holds no prompts")
    return [prompt.encode(lm.tokenizer) for prompt in taken]


@dataclass
class PromptSource(TextSource):
    """Prompts to decode: of a file, or the beginnings of held-out documents."""

    prompt_file: str | None = None
    """JSONL of prompts, see `from_file`; default: the beginnings of held-out documents."""
    prompts: int = 6
    prompt_tokens: int = 64
    """Length of a beginning."""
    max_new_tokens: int = 64


def load_prompts(lm: EarlyExitLM, source: PromptSource, checkpoint: str) -> list[list[int]]:
    """Token ids of the prompts that `source` names.

    Raises:
        ValueError: an impossible number, an unreadable file, or no document that is long enough.
    """
    for key in ("prompts", "prompt_tokens", "max_new_tokens"):
        check(getattr(source, key) >= 1, key, getattr(source, key), "1 or more")
    if source.prompt_file:
        return from_file(lm, Path(source.prompt_file), source.prompts)
    return beginnings(
        lm,
        source,
        checkpoint,
        count=source.prompts,
        tokens=source.prompt_tokens,
        room=source.max_new_tokens,
    )
