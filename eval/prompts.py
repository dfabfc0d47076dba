"""Text and prompts of an evaluation: held-out documents, their beginnings, and prompt sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.prompt_sets import load_prompt_set
from eval.settings import HELD_OUT, HeldOutShare, Name, PromptSource, TextSource
from hispec.checkpoint.format import CONFIG, is_checkpoint, read_config
from hispec.data.documents import STDLIB, Document, documents, held_out_stream, split
from hispec.data.packing import Rows, evenly_spaced, windows
from hispec.data.prompts import spread
from hispec.lm import EarlyExitLM
from hispec.utils.schema import STRICT, validate
from hispec.utils.settings import check


@dataclass
class _Text:
    """A `TextSource` completed from a recipe."""

    __pydantic_config__ = STRICT

    data: Name = STDLIB
    data_split: Name = "train"
    text_column: Name = "text"
    held_out: HeldOutShare = 0.05
    streaming: bool = False  # as in recipes from before there was the key


def held_out_documents(
    source: TextSource, checkpoint: str
) -> tuple[str, list[Document] | Iterator[Document]]:
    """The held-out documents of a source.

    Args:
        checkpoint: folder whose recipe says what `source` leaves open, or any other model.

    Returns:
        The name of the text, and all its held-out documents, or, if it is streamed, an iterator
        that reads on as more are needed.

    Raises:
        ValueError: no such text, or nothing in it.
    """
    folder = Path(checkpoint)
    recipe: dict[str, Any] = read_config(folder)["recipe"] if is_checkpoint(folder) else {}
    given = {key: getattr(source, key) for key in vars(_Text()) if getattr(source, key) is not None}
    told = {key: recipe[key] for key in vars(_Text()) if key in recipe}
    text = validate(_Text, told | given, folder / CONFIG if told else "")
    if text.streaming:
        stream = held_out_stream(text.data, text.text_column, text.data_split, text.held_out)
        return text.data, stream
    whole = documents(text.data, text.text_column, text.data_split)
    return text.data, split(whole, text.held_out)[1]


def held_out_rows(
    source: TextSource, checkpoint: str, lm: EarlyExitLM, seq_len: int, sequences: int
) -> tuple[str, Rows]:
    """(name of the text, `sequences` rows of `seq_len` tokens of its held-out documents)."""
    name, held_out = held_out_documents(source, checkpoint)
    # A stream gives its first rows, as in training; a text that is read at once evenly spaced ones.
    most = None if isinstance(held_out, list) else sequences
    found = windows(held_out, lm.tokenizer, seq_len, most, f"held-out text ({name})")
    return name, evenly_spaced(found, sequences)


def document_beginnings(
    lm: EarlyExitLM, source: TextSource, checkpoint: str, *, count: int, tokens: int, room: int
) -> list[list[int]]:
    """The first `tokens` tokens of `count` held-out documents with at least `room` tokens more.

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
class TokenizedPrompt:
    """A prompt as the model gets it."""

    task: str
    tokens: list[int]


def load_prompts(lm: EarlyExitLM, source: PromptSource, checkpoint: str) -> list[TokenizedPrompt]:
    """Tokenize the prompts that `source` names, ordered by task.

    Raises:
        ValueError: a set that cannot be read, or no document that is long enough.
    """
    if source.prompts_from != HELD_OUT:
        selected = spread(load_prompt_set(source.prompts_from), source.prompts)
        return [TokenizedPrompt(p.task, p.encode(lm.tokenizer, source.chat)) for p in selected]
    check(not source.chat, "chat", source.chat, f"prompts_from={HELD_OUT!r} has texts to continue")
    found = document_beginnings(
        lm,
        source,
        checkpoint,
        count=source.prompts,
        tokens=source.prompt_tokens,
        room=source.max_new_tokens,
    )
    return [TokenizedPrompt(HELD_OUT, tokens) for tokens in found]
