"""Prompt sets by name: our own, those that papers measure on, and local files of the same shape.

A set's rows keep the columns that they have where they come from; `as_asked` knows what each shape
asks for. So a local JSONL of such rows does wherever the Hub cannot be reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from hispec.data.documents import local_rows, reason
from hispec.data.prompts import Prompt, builtin, to_prompt

BUILTIN = "builtin"
MOST = 2_000
"""Rows of a set that are read: some have a hundred thousand."""
_MT_BENCH = {
    *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
}
"""Categories of Spec-Bench that are one task there."""


@dataclass(frozen=True)
class Published:
    """Where `datasets` finds a set."""

    path: str
    """Id on the Hub, or the format of `file`."""
    config: str | None = None
    split: str = "test"
    file: str | None = None
    """The one file of the dataset that is read, or an address."""

    def open(self) -> Iterable[Mapping[str, Any]]:
        """Its rows, streamed."""
        from datasets import load_dataset  # slow to import, and seldom wanted

        return load_dataset(
            self.path, self.config, data_files=self.file, split=self.split, streaming=True
        )


_SPEC_BENCH = (
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
)
SETS = {
    "spec-bench": Published("json", split="train", file=_SPEC_BENCH),
    "humaneval": Published("openai/openai_humaneval"),
    "gsm8k": Published("openai/gsm8k", "main"),
    "cnn-dm": Published("abisee/cnn_dailymail", "3.0.0"),
    "xsum": Published("EdinburghNLP/xsum"),
    "sharegpt": Published(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        split="train",
        file="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
}


def task_prompts(source: str) -> list[Prompt]:
    """The prompts of a set, of `builtin`, or of a local JSONL file; rows without a task get the
    name of the set.

    Raises:
        ValueError: nothing of that name, a set that cannot be had, or a row that asks nothing.
    """
    if source == BUILTIN:
        return builtin()
    if Path(source).is_file():
        rows: Iterable[tuple[int, Mapping[str, Any]]] = local_rows(Path(source))
        return _prompts(rows, source, Path(source).stem)
    if source not in SETS:
        raise ValueError(
            f"prompts_from={source!r} is neither a local file nor one of {BUILTIN}, "
            f"{', '.join(SETS)}"
        )
    return _prompts(_published_rows(source), source, source)


def _published_rows(name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    published = SETS[name]
    try:
        yield from enumerate(islice(published.open(), MOST), start=1)
    except Exception as error:  # the library raises a dozen unrelated types here
        where = published.file if published.path == "json" else f"{published.path} on the Hub"
        raise ValueError(
            f"prompts_from={name!r}: {where} cannot be read ({reason(error)}); name a local JSONL "
            f"file of its rows instead, or {BUILTIN}"
        ) from error


def _prompts(rows: Iterable[tuple[int, Mapping[str, Any]]], source: str, task: str) -> list[Prompt]:
    """Raises ValueError: a row that asks nothing, or none at all."""
    prompts = []
    for line, row in rows:
        asked = as_asked(row)
        if asked is not None:
            prompt = to_prompt(asked, line, f"{source}, line {line}")
            prompts.append(prompt if prompt.task else replace(prompt, task=task))
    if not prompts:
        raise ValueError(f"{source} holds no prompts")
    return prompts


def as_asked(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A row of any of the sets as a row of prompts (see `hispec.prompts.to_prompt`), or None where
    nobody asks anything.

    CNN/DM (`article`, `highlights`) and XSum (`document`, `summary`) are texts to summarise,
    ShareGPT (`conversations` of `from` and `value`) gives the first question, Spec-Bench (`turns`,
    `category`) its category as the task. HumanEval (`prompt`) and GSM8K (`question`) are as they
    should be.
    """
    if "article" in row and "highlights" in row:
        return {"question": f"Summarize the following article.\n\n{row['article']}"}
    if "document" in row and "summary" in row:
        return {
            "question": f"Summarize the following article in one sentence.\n\n{row['document']}"
        }
    if "conversations" in row:
        return _first_question(row["conversations"])
    if "turns" in row and "category" in row and "task" not in row:
        category = row["category"]
        return {"turns": row["turns"], "task": "mt_bench" if category in _MT_BENCH else category}
    return row


def _first_question(turns: Iterable[Mapping[str, Any]]) -> dict[str, str] | None:
    """Only a chat that the user begins counts: what is said after an answer that is not there is no
    question."""
    first = next(iter(turns), None)
    if first is None or first.get("from") not in ("human", "user"):
        return None
    return {"question": first["value"]} if first["value"].strip() else None
