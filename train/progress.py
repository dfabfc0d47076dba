"""The progress bar of a run, or a line every 50 steps where there is no terminal."""

from __future__ import annotations

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
Report = Callable[[int, Figures], None]
_HIDDEN = ("learning rate",)  # follows the recipe; trackers get it
_WHOLE = ("tokens/s",)


@contextmanager
def progress_bar(console: Console, total: int, done: int, *, shown: bool) -> Iterator[Report]:
    """Show moving averages of the figures over about twenty steps.

    Yields:
        A function to call after each step: (steps done, figures by name).
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

        def report(step: int, figures: Figures) -> None:
            for key, value in figures.items():
                if key not in _HIDDEN:
                    mean[key] = value if key not in mean else 0.95 * mean[key] + 0.05 * value
            line = "  ".join(
                f"{key} {value:.0f}" if key in _WHOLE else f"{key} {value:.2f}"
                for key, value in mean.items()
            )
            bar.update(task, completed=step, figures=line)
            if shown and not console.is_terminal and step % LOG_EVERY == 0:
                console.print(f"step {step} of {total}: {line}", highlight=False, soft_wrap=True)

        yield report


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Values as every tracker takes them: numbers and texts."""
    return {
        key: value if isinstance(value, (int, float, str)) else str(value)
        for key, value in nested.items()
    }
