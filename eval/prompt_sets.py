"""Prompt sets by name: the package's own, those that papers measure on, and local files.

A row of a set has the columns that it has where it is published, and `to_prompt_row` knows what is
asked in each shape. So a local JSONL file of such rows replaces a set where the Hub is out of
reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from hispec.data.prompts import Prompt, builtin, to_prompt
from hispec.data.rows import NonEmpty, Row, local_rows, reason
from hispec.utils.schema import validate

BUILTIN = "builtin"
MAX_ROWS = 2_000
"""Rows of a set that are read; some sets have a hundred thousand."""
_MT_BENCH = {
    *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
}
"""Categories of Spec-Bench that together are its task MT-Bench."""


@dataclass(frozen=True)
class PublishedSet:
    """Where `datasets` finds a set."""

    path: str
    """Id on the Hub, or the format of `file`."""
    config: str | None = None
    split: str = "test"
    file: str | None = None
    """The only file of the dataset that is read, or a URL."""

    def open(self) -> Iterable[Mapping[str, Any]]:
        """Its rows, streamed."""
        from datasets import load_dataset  # slow to import, and seldom needed

        return load_dataset(
            self.path, self.config, data_files=self.file, split=self.split, streaming=True
        )


_SPEC_BENCH = (
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
)
SETS = {
    "spec-bench": PublishedSet("json", split="train", file=_SPEC_BENCH),
    "humaneval": PublishedSet("openai/openai_humaneval"),
    "gsm8k": PublishedSet("openai/gsm8k", "main"),
    "cnn-dm": PublishedSet("abisee/cnn_dailymail", "3.0.0"),
    "xsum": PublishedSet("EdinburghNLP/xsum"),
    "sharegpt": PublishedSet(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        split="train",
        file="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
}


class CnnDailyMailRow(Row):
    """A news article to summarise."""

    article: NonEmpty


class XSumRow(Row):
    """A news article to summarise in one sentence."""

    document: NonEmpty


class SpecBenchRow(Row):
    """A question of one or more turns; its category is its task."""

    turns: list[NonEmpty] = Field(min_length=1)
    category: str


class ShareGptTurn(Row):
    """One message of a ShareGPT chat."""

    sender: str = Field(alias="from")
    value: str


class ShareGptRow(Row):
    """A chat between a user and ChatGPT."""

    conversations: list[ShareGptTurn]


def load_prompt_set(source: str) -> list[Prompt]:
    """Read the prompts of a set, of `builtin`, or of a local JSONL file.

    The task of a row that names none is the set's or the file's name.

    Raises:
        ValueError: nothing of that name, a set that cannot be read, or a row without a prompt.
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
        yield from enumerate(islice(published.open(), MAX_ROWS), start=1)
    except Exception as error:  # the library raises a dozen unrelated types here
        where = published.file if published.path == "json" else f"{published.path} on the Hub"
        raise ValueError(
            f"prompts_from={name!r}: {where} cannot be read ({reason(error)}); name a local JSONL "
            f"file of its rows instead, or {BUILTIN}"
        ) from error


def _prompts(rows: Iterable[tuple[int, Mapping[str, Any]]], source: str, task: str) -> list[Prompt]:
    """Raises ValueError: a row without a prompt, or no rows with one."""
    prompts = []
    for line, row in rows:
        where = f"{source}, line {line}"
        prompt_row = to_prompt_row(row, where)
        if prompt_row is not None:
            prompt = to_prompt(prompt_row, line, where)
            prompts.append(prompt if prompt.task else replace(prompt, task=task))
    if not prompts:
        raise ValueError(f"{source} holds no prompts")
    return prompts


def to_prompt_row(row: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    """Turn a row of any of the sets into a prompt row (see `hispec.data.prompts.to_prompt`).

    CNN/DailyMail (`article`, `highlights`) and XSum (`document`, `summary`) ask for a summary,
    ShareGPT (`conversations`) asks its first question, Spec-Bench (`turns`, `category`) has its
    category as task. HumanEval (`prompt`) and GSM8K (`question`) are prompt rows already.

    Args:
        where: what messages call the row.

    Returns:
        None for a ShareGPT chat that the user does not begin: what is said after an answer that
        is not there is no question.

    Raises:
        ValueError: the row has the columns of a set, but they hold something else.
    """
    if "article" in row and "highlights" in row:
        article = validate(CnnDailyMailRow, dict(row), where).article
        return {"question": f"Summarize the following article.\n\n{article}"}
    if "document" in row and "summary" in row:
        article = validate(XSumRow, dict(row), where).document
        return {"question": f"Summarize the following article in one sentence.\n\n{article}"}
    if "conversations" in row:
        first = next(iter(validate(ShareGptRow, dict(row), where).conversations), None)
        if first is None or first.sender not in ("human", "user") or not first.value.strip():
            return None
        return {"question": first.value}
    if "turns" in row and "category" in row and "task" not in row:
        question = validate(SpecBenchRow, dict(row), where)
        task = "mt_bench" if question.category in _MT_BENCH else question.category
        return {"turns": question.turns, "task": task}
    return row
