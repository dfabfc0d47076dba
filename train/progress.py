"""What a user sees of a run while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_EVERY = 50  # steps between two lines where there is no terminal for a bar

Figures = dict[str, float]
Watch = Callable[[int, Figures, int], None]


@contextmanager
def progress_bar(console: Console, total: int, done: int, *, shown: bool) -> Iterator[Watch]:
    """A bar, or a line now and then, of moving averages over about twenty steps.

    Yields:
        What to call after each step: (steps done, figures by name, tokens of the step).
    """
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("", total=total, completed=done, figures="")
        mean: dict[str, Any] = {}
        last: float | None = None

        def watch(step: int, figures: Figures, tokens: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if last is not None:
                figures = {**figures, "tok/s": tokens / (now - last)}
            last = now
            for key, value in figures.items():
                mean[key] = value if key not in mean else 0.95 * mean[key] + 0.05 * value
            line = "  ".join(
                f"{key} {value:.0f}" if key == "tok/s" else f"{key} {value:.2f}"
                for key, value in mean.items()
            )
            bar.update(task, completed=step, figures=line)
            if shown and not console.is_terminal and step % LOG_EVERY == 0:
                console.print(f"step {step} of {total}: {line}", highlight=False, soft_wrap=True)

        yield watch
