"""What a sample is while it is being made."""

from __future__ import annotations

from dataclasses import dataclass

from hispec.data.prompts import Prompt


@dataclass
class Turn:
    """One turn that the target generated, or a user's turn of the file."""

    text: str
    tokens: list[int]
    ended: bool = True
    """Whether it ended by itself and not at the length limit."""
    fault: str | None = None
    """Why it is dropped; None if it is not."""


@dataclass
class Sample:
    """A sample while it is being made."""

    index: int
    prompt: Prompt | None
    """From the file; None if it is invented."""
    question: Turn | None = None
    """The user's turn; None where text is continued."""
    context: list[int] | None = None
    """Token ids that the answer continues; None if the user's turn is dropped."""
    answer: Turn | None = None
    decoded: int = 0
    """Tokens that the target generated for it."""
