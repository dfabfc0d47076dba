"""Prompts: what a row of a JSONL file asks for, a set of our own, and how to take a few of many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hispec.data.chat import Message, is_chat
from hispec.data.documents import local_rows
from hispec.utils.settings import check

BUILTIN = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    """A turn to answer, or a text to continue."""

    line: int
    """Where it stands in its file, from 1 on."""
    text: str
    """What is continued as it is; empty where `messages` are answered."""
    messages: tuple[Message, ...] = ()
    """What is answered in the chat template; its last turn is the user's."""
    task: str = ""

    def raw(self, tokenizer: Any) -> bool:
        """Whether it is continued as it is: a text, or a question to a base without a template."""
        return not self.messages or not tokenizer.chat_template

    def encode(self, tokenizer: Any, chat: bool | None = None) -> list[int]:
        """Token ids of the prompt.

        Args:
            chat: put it in the chat template, a text as the user's turn, or in none; None does what
                suits it, see `raw`.

        Raises:
            ValueError: `chat` without a template, or more than one turn without it.
        """
        if chat is None:
            chat = not self.raw(tokenizer)
        if chat:
            check(bool(tokenizer.chat_template), "chat", chat, "the tokenizer has no chat template")
            messages = self.messages or _asked(self.text, f"line {self.line}")
            return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)[
                "input_ids"
            ]
        if len(self.messages) > 1:
            why = "chat=False" if tokenizer.chat_template else "the tokenizer has no chat template"
            raise ValueError(
                f"the prompt of line {self.line} has {len(self.messages)} turns, but {why}"
            )
        return tokenizer(self.messages[0]["content"] if self.messages else self.text)["input_ids"]


def read_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a JSONL file, see `to_prompt`.

    Raises:
        ValueError: no such file, a line that is no JSON object, or a row that asks nothing.
    """
    for line, row in local_rows(path):
        yield to_prompt(row, line, f"{path}, line {line}")


def to_prompt(row: Mapping[str, Any], line: int, where: str) -> Prompt:
    """What a row asks for.

    It is a Spec-Bench question (`turns`: the first one is asked; `task`), a `question`, a chat
    (`messages`: what stands up to the user's first turn), or a `prompt`, continued as it is.

    Args:
        where: what messages call the row.

    Raises:
        ValueError: it is none of these, or empty.
    """
    task = str(row.get("task", ""))
    turns = row.get("turns")
    if isinstance(turns, Sequence) and turns:
        return Prompt(line, "", _asked(turns[0], where), task)
    if "question" in row:
        return Prompt(line, "", _asked(row["question"], where), task)
    if is_chat(row.get("messages")):
        return Prompt(line, "", _first_turn(row["messages"], where), task)
    if "prompt" in row:
        return Prompt(line, _filled(row["prompt"], where), (), task)
    raise ValueError(
        f"{where} has none of turns, question, messages, prompt; it has: {', '.join(row)}"
    )


def builtin() -> list[Prompt]:
    """The prompts that come with the package, eight each of chat, code, math, summarization,
    translation and retrieval: single turns that a base without a chat template can take too."""
    return list(read_prompts(BUILTIN))


def some(data: Path | None, count: int) -> tuple[list[Prompt], str]:
    """(`count` prompts of a JSONL file, or of our own set, see `spread`; where they come from)."""
    if data is None:
        return spread(builtin(), count), "hispec's own prompts"
    return spread(read_prompts(data), count), data.name


def spread(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts, or all if they are fewer, task after task.

    As many of each task, as far as it has them, at even distances in it, so that the choice
    depends on nothing but the number.

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


def _filled(text: Any, where: str) -> str:
    if not str(text):
        raise ValueError(f"{where} has an empty prompt")
    return str(text)


def _asked(question: Any, where: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": _filled(question, where)},)


def _first_turn(messages: Sequence[dict[str, Any]], where: str) -> tuple[Message, ...]:
    asked: list[Message] = []
    for message in messages:
        asked.append({"role": message["role"], "content": _filled(message["content"], where)})
        if message["role"] == "user":
            return tuple(asked)
    raise ValueError(f"{where}: its messages have no turn of the role 'user'")
