"""Chats as text and tokens: the tokenizer's chat template applied, the assistant's part marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]
"""`role` and `content`."""


def render(
    messages: Sequence[Message], tokenizer: Any, name: str
) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat with the tokenizer's template.

    Args:
        name: of the chat, for messages.

    Returns:
        The text, and the spans [start, stop) of its characters that the assistant wrote. A span
        includes what the template writes at the end of a turn, but not what it writes before it.

    Raises:
        ValueError: the tokenizer has no chat template, no message is the assistant's, or the
            template rewrites earlier turns, so that a span cannot be located.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{name} is a chat, but the base's tokenizer has no chat template")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{name}: a chat without a turn of the role 'assistant' teaches nothing")
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
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
        spans.append((len(before), len(after)))
    return whole, spans


def encode(messages: Sequence[Message], tokenizer: Any, name: str) -> tuple[list[int], list[bool]]:
    """Tokenize a chat: (its token ids, for each whether the assistant wrote it).

    Raises:
        ValueError: as `render`.
    """
    text, spans = render(messages, tokenizer, name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    by_assistant = [  # a token may begin with the space before the first word
        any(start < stop and first < end for first, stop in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], by_assistant


def user_turn(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes (before a user's first message, between it and the answer).

    Spaces at the end of the first part are left out: tokenizers join a space with the word after
    it, so a model has hardly ever seen a space alone there.

    Raises:
        ValueError: there is no chat template, or it does not write a user's message unchanged.
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
