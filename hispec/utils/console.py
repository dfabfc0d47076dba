"""Printing to the terminal, for all commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""`progress(items, title)` yields the items one by one and may show how many are done."""


class Output(Console):
    """A rich console that highlights nothing and, when the output goes to a file, does not wrap
    lines at 80 columns."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(highlight=False, stderr=stderr, width=None if stream.isatty() else 120)

    def say(self, text: str) -> None:
        """Print one line without markup or wrapping."""
        self.print(text, markup=False, soft_wrap=True)


def bar(items: Iterable[Any], title: str) -> Iterable[Any]:
    """A `Progress` that draws a bar on standard error if that is a terminal."""
    console = Output(stderr=True)
    hidden = not console.is_terminal
    return track(list(items), title, transient=True, console=console, disable=hidden)


def few(names: Sequence[str]) -> str:
    """The first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def quiet_transformers() -> None:
    """Keep transformers' progress bars and warnings out of our own output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def one_line(error: Exception) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())
