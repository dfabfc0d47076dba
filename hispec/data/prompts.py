"""Prompts: read from rows of JSONL files, those that come with the package, an even selection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from hispec.data.chat import Message
from hispec.data.rows import ChatMessage, NonEmpty, Row, local_rows
from hispec.utils.schema import validate
from hispec.utils.settings import check

BUILTIN = Path(__file__).with_name("prompts.jsonl")
_KINDS = ("turns", "question", "messages", "prompt")
"""Columns that hold a prompt; the first one that a row has is used."""


@dataclass(frozen=True)
class Prompt:
    """A question to answer or a text to continue."""

    line: int
    """Number of its line in its file, from 1 on."""
    text: str
    """Text to continue as it is; empty where `messages` are to be answered."""
    messages: tuple[Message, ...] = ()
    """Messages to put in the chat template; the last one is the user's."""
    task: str = ""

    def raw(self, tokenizer: Any) -> bool:
        """Whether no chat template is applied: to a text, or with a tokenizer that has none."""
        return not self.messages or not tokenizer.chat_template

    def encode(self, tokenizer: Any, chat: bool | None = None) -> list[int]:
        """Token ids of the prompt.

        Args:
            chat: whether to apply the chat template (a text becomes the user's turn); default: to
                questions, if the tokenizer has a template, see `raw`.

        Raises:
            ValueError: `chat` without a template, or more than one message without it.
        """
        if chat is None:
            chat = not self.raw(tokenizer)
        if chat:
            check(bool(tokenizer.chat_template), "chat", chat, "the tokenizer has no chat template")
            messages = self.messages or _question(self.text)
            return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)[
                "input_ids"
            ]
        if len(self.messages) > 1:
            why = "chat=False" if tokenizer.chat_template else "the tokenizer has no chat template"
            raise ValueError(
                f"the prompt of line {self.line} has {len(self.messages)} turns, but {why}"
            )
        return tokenizer(self.messages[0]["content"] if self.messages else self.text)["input_ids"]


class PromptRow(Row):
    """A row of a prompt file; it has one of the columns in `_KINDS`."""

    # empty stands for a missing column: a column that is there may be neither null nor empty
    task: str = ""
    turns: list[NonEmpty] = Field(default_factory=list, min_length=1)
    question: NonEmpty = ""
    messages: list[ChatMessage] = Field(default_factory=list, min_length=1)
    prompt: NonEmpty = ""


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Yield the prompts of a JSONL file, see `to_prompt`.

    Raises:
        ValueError: there is no such file, a line is no JSON object, or a row has no prompt; the
            message names the file and the line.
    """
    for line, row in local_rows(path):
        yield to_prompt(row, line, f"{path}, line {line}")


def to_prompt(row: Mapping[str, Any], line: int, where: str) -> Prompt:
    """The prompt in a row.

    It is the first of `turns` (Spec-Bench), a `question`, the `messages` of a chat up to the
    user's first one, or a `prompt` to continue as it is. Columns that are null count as missing
    where another one holds the prompt, as tables have them. `task` names its task.

    Args:
        where: what messages call the row.

    Raises:
        ValueError: the row has none of these columns, or no text in it.
    """
    given = {key: value for key, value in row.items() if value is not None}
    kind = next((key for source in (given, row) for key in _KINDS if key in source), None)
    if kind is None:
        raise ValueError(f"{where} has none of {', '.join(_KINDS)}; it has: {', '.join(row)}")
    columns = {key: given[key] for key in ("task",) if key in given}
    found = validate(PromptRow, {**columns, kind: row[kind]}, where)
    if kind == "turns":
        return Prompt(line, "", _question(found.turns[0]), found.task)
    if kind == "question":
        return Prompt(line, "", _question(found.question), found.task)
    if kind == "messages":
        return Prompt(line, "", _first_turn(found.messages, where), found.task)
    return Prompt(line, found.prompt, (), found.task)


def builtin() -> list[Prompt]:
    """The prompts that come with the package: eight each of chat, code, math, summarization,
    translation and retrieval, of one turn, so that a base without a chat template takes them."""
    return list(read_prompts(BUILTIN))


def some(data: Path | None, count: int) -> tuple[list[Prompt], str]:
    """Select `count` prompts of a JSONL file, or of the package's own: (prompts, their source).

    Raises:
        ValueError: as `read_prompts` and `spread`.
    """
    if data is None:
        return spread(builtin(), count), "hispec's own prompts"
    return spread(read_prompts(data), count), data.name


def spread(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """Select `count` prompts, or all if there are fewer, ordered by task.

    Every task gives the same number as far as it has them, at even distances, so that the
    selection depends on nothing but the count.

    Raises:
        ValueError: a count below 1.
    """
    check(count >= 1, "prompts", count, "1 or more")
    by_task: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_task[prompt.task].append(prompt)
    share = dict.fromkeys(by_task, 0)
    left = min(count, sum(map(len, by_task.values())))
    while left:
        for task, rows in by_task.items():
            taken = share[task] < len(rows) and left > 0
            share[task] += taken
            left -= taken
    return [
        rows[i * len(rows) // share[task]]
        for task, rows in by_task.items()
        for i in range(share[task])
    ]


def _question(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _first_turn(messages: Sequence[ChatMessage], where: str) -> tuple[Message, ...]:
    """The messages up to the user's first one."""
    found: list[Message] = []
    for number, message in enumerate(messages):
        if not message.content:
            raise ValueError(f"{where}: messages[{number}].content is an empty prompt")
        found.append(message.model_dump())
        if message.role == "user":
            return tuple(found)
    raise ValueError(f"{where}: its messages have no turn of the role 'user'")
