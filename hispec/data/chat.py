"""Chats as text: what the tokenizer's template makes of them, and what of it the assistant said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]


def is_chat(value: Any) -> bool:
    """Whether a value of a row is a list of messages, each with `role` and `content`."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, dict) for message in value)
        and all(isinstance(m.get(key), str) for m in value for key in ("role", "content"))
    )


def render(
    messages: Sequence[Message], tokenizer: Any, name: str
) -> tuple[str, list[tuple[int, int]]]:
    """(text of a chat, the stretches [start, stop) of characters that the assistant wrote).

    What ends a turn is part of it; what opens one is not.

    Args:
        name: of the chat, for messages.

    Raises:
        ValueError: the tokenizer has no chat template, the assistant says nothing, or the template
            rewrites earlier turns, so that they cannot be told from the chat's text.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{name} is a chat, but the base's tokenizer has no chat template")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{name}: a chat without a turn of the role 'assistant' teaches nothing")
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    spoken = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(
            messages[:turn], tokenize=False, add_generation_prompt=True
        )
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"{name}: the chat template writes turn {turn + 1} otherwise once more turns "
                "follow; give one exchange per row"
            )
        spoken.append((len(before), len(after)))
    return whole, spoken


def encode(messages: Sequence[Message], tokenizer: Any, name: str) -> tuple[list[int], list[bool]]:
    """(token ids of a chat, for each whether the assistant wrote it). Raises as `render`."""
    text, spoken = render(messages, tokenizer, name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    said = [  # a token may begin with the space before the first word
        any(start < stop and first < end for first, stop in spoken)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], said


def user_turn(tokenizer: Any) -> tuple[str, str]:
    """(what the template writes before the user's first words, from their end to the assistant's).

    Spaces at the end of the opening are left out: tokenizers write a space with the word after it,
    so a model that is to go on there would never have seen one alone.

    Raises:
        ValueError: no chat template, or one that does not write a user's turn once, as it is.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    words = "WhatTheUserSays"
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
    )
    if text.count(words) != 1:
        raise ValueError("the chat template does not write a user's turn once, as it is")
    before, after = text.split(words)
    return before.rstrip(" "), after
