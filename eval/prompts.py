"""Prompts to decode: lines of a JSONL file, or the beginnings of held-out documents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hispec.lm import EarlyExitLM
from hispec.text import documents, local_rows, split


def beginnings(
    lm: EarlyExitLM, source: str, held_out: float, *, count: int, tokens: int, room: int
) -> list[list[int]]:
    """The first `tokens` tokens of held-out documents that go on for at least `room` more.

    Raises:
        ValueError: no document is that long.
    """
    found: list[list[int]] = []
    for document in split(documents(source), held_out)[1]:
        ids = lm.tokenizer(document.text, verbose=False)["input_ids"]
        if len(ids) >= tokens + room:
            found.append(ids[:tokens])
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"no held-out document of {source!r} has {tokens + room} tokens or more")
    return found


def from_file(lm: EarlyExitLM, path: Path, count: int) -> list[list[int]]:
    """`count` prompts of a JSONL file, spread evenly over its tasks.

    A row is a Spec-Bench question (`turns`: the first one is asked, in the chat template where
    there is one; `task`) or any row with a `prompt` (continued as it is) or a `question`.

    Raises:
        ValueError: a row with none of these.
    """
    by_task: dict[str, list[list[int]]] = defaultdict(list)
    for number, row in local_rows(path):
        by_task[str(row.get("task", ""))].append(_encode(lm, path, number, row))
    tasks = list(by_task.values())
    share = [count // len(tasks) + (i < count % len(tasks)) for i in range(len(tasks))]
    return [
        rows[j * len(rows) // wanted]
        for rows, wanted in zip(tasks, share, strict=True)
        for j in range(min(wanted, len(rows)))
    ]


def _encode(lm: EarlyExitLM, path: Path, number: int, row: dict[str, object]) -> list[int]:
    turns = row.get("turns")
    if isinstance(turns, Sequence) and turns:
        return lm.encode(str(turns[0]))
    if "question" in row:
        return lm.encode(str(row["question"]))
    if "prompt" in row:
        return lm.encode(str(row["prompt"]), chat=False)
    raise ValueError(
        f"{path}, line {number} has none of turns, question, prompt; it has: {', '.join(row)}"
    )
