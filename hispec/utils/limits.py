"""Limits of settings that need words of their own, and types that several settings share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field


def one_of(*allowed: str | None) -> AfterValidator:
    """A limit: one of these values."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(map(str, allowed))}")
        return value

    return AfterValidator(check)


def at_most(limit: int, cost: str) -> AfterValidator:
    """A limit for a number that buys memory or time.

    Args:
        cost: what a larger one would cost.
    """

    def check(value: int) -> int:
        if value > limit:
            raise ValueError(f"at most {limit:,}: {cost}")
        return value

    return AfterValidator(check)


def ending_in(ending: str) -> AfterValidator:
    """A limit for a file name."""

    def check(value: str) -> str:
        if not value.endswith(ending):
            raise ValueError(f"a name that ends in {ending}")
        return value

    return AfterValidator(check)


def _temperature(value: float) -> float:
    if value != 0 and value < 1e-3:
        raise ValueError("0 (greedy), or 0.001 and more")
    return value


Share = Annotated[float, Field(ge=0, le=1)]
"""From 0 to 1."""
PartialShare = Annotated[float, Field(ge=0, lt=1)]
"""From 0, below 1."""
Weight = Annotated[float, Field(ge=0, le=1000)]
"""Of a term of the loss; larger ones overflow in half precision."""
Threads = Annotated[
    int, Field(ge=1), at_most(1024, "each thread has a stack of its own, and cores are fewer")
]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Temperature = Annotated[float, AfterValidator(_temperature), Field(le=100)]
MaxNewTokens = Annotated[
    int, Field(ge=1), at_most(2**17, "the KV cache has room for all of them from the start")
]
