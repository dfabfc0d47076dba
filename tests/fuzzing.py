"""Fuzzing: the settings of hypothesis tests in CI and in `make fuzz`, and a count of their cases.

`@fuzz("GROUP", 150)` above `@given(...)` runs 150 cases, always the same ones, in `make test`, and
`FUZZ_TIMES` times as many, new ones each time, in `make fuzz`. No case may take over ten seconds.
"""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("FUZZ_TIMES", "0"))
"""0 in `make test`."""


@dataclass
class Group:
    """Cases of one group."""

    cases: int = 0
    failed: int = 0
    slowest: float = 0.0
    """Seconds."""


GROUPS: dict[str, Group] = defaultdict(Group)


def fuzz(group: str, examples: int) -> Callable[[Any], Any]:
    """Marks a hypothesis test as one of a group of the fuzzer.

    Args:
        group: what is fuzzed, for the table.
        examples: cases in `make test`.
    """

    def mark(test: Any) -> Any:
        test.hypothesis.inner_test = _counted(test.hypothesis.inner_test, group)
        limits = settings(
            max_examples=examples * max(1, TIMES),
            derandomize=not TIMES,
            database=None,
            deadline=timedelta(seconds=10),
            suppress_health_check=list(HealthCheck),
        )
        return pytest.mark.fuzz(limits(test))

    return mark


def _counted(inner: Callable[..., Any], group: str) -> Callable[..., Any]:
    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> Any:
        found, began = GROUPS[group], time.perf_counter()
        try:
            result = inner(*args, **kwargs)
        except Exception:  # not hypothesis' own StopTest, which ends a draw that became too large
            found.cases += 1
            found.failed += 1
            raise
        found.cases += 1
        found.slowest = max(found.slowest, time.perf_counter() - began)
        return result

    return counted


def table() -> list[str]:
    """One line per group, and the sum."""
    lines = [f"{'group':36} {'cases':>7} {'failed':>7} {'slowest s':>10}"]
    for name, found in GROUPS.items():
        lines.append(f"{name:36} {found.cases:7} {found.failed:7} {found.slowest:10.2f}")
    cases, failed = (sum(getattr(g, key) for g in GROUPS.values()) for key in ("cases", "failed"))
    return [*lines, f"{'all':36} {cases:7} {failed:7}"]
