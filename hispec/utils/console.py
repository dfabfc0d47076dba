"""The terminal: one place for how the commands print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""`progress(items, title)` yields the items one by one and may show how many are done."""


class Output(Console):
    """A console without guessing: no highlighting, and no wrapping of lines at 80 columns when the
    output goes to a file."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(highlight=False, stderr=stderr, width=None if stream.isatty() else 120)

    def say(self, text: str) -> None:
        """Print one line as it is, however long."""
        self.print(text, markup=False, soft_wrap=True)


def bar(items: Iterable[Any], title: str) -> Iterable[Any]:
    """A `Progress` that draws a bar on standard error if that is a terminal."""
    console = Output(stderr=True)
    hidden = not console.is_terminal
    return track(list(items), title, transient=True, console=console, disable=hidden)


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def quiet_transformers() -> None:
    """No bars and warnings of weight loading between the lines of our own output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
