"""Shared by all command lines: parsing of values, and errors as one line with exit code 2."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hispec.utils.settings import check

_DEPTH = re.compile(r"[0-9]{1,9}")


def parse_depths(key: str, text: str | None) -> list[int] | None:
    """Parse depths such as `6,12,30`.

    Raises:
        ValueError: not numbers, or not increasing; the message names the key.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    check(all(map(_DEPTH.fullmatch, parts)), key, text, "write depths such as 6,12,30")
    depths = [int(part) for part in parts]
    check(all(a < b for a, b in pairwise(depths)), key, text, "increasing depths, none twice")
    return depths


def parse_dtype(name: str) -> Any:
    """A torch dtype, or "auto".

    Raises:
        ValueError: an unknown name.
    """
    import torch

    known = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16,
             "float16": torch.float16}  # fmt: skip
    check(name in known, "dtype", name, f"one of {', '.join(known)}")
    return known[name]


def parse_device(name: str | None) -> Any:
    """A torch device that computes on this machine, or None.

    Raises:
        ValueError: an unknown name, or a device that is not here or holds no values.
    """
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.ones(1, device=device).tolist()  # a meta tensor has no values to read
    # torch raises AssertionError for a backend that it was built without
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} is not possible here: {reason}") from None
    check(device.type != "cpu" or not device.index, "device", name, "there is one CPU: cpu")
    return device


def read_prompt(prompt: str) -> str:
    """A prompt as it was given, or standard input for `-`.

    Raises:
        ValueError: standard input is closed, or is not valid UTF-8.
    """
    if prompt != "-":
        return prompt
    where = "the prompt from standard input (-)"
    if sys.stdin is None:
        raise ValueError(f"{where} cannot be read: standard input is closed")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not valid UTF-8: byte {error.start} is wrong") from None


def run_cleanly(command: Callable[[], Any]) -> int:
    """Run `command` and return its exit code.

    An error that the user can correct becomes one line on standard error and exit code 2, and a
    warning becomes one line.
    """
    from hispec.utils.files import FetchError

    warnings.showwarning = _show_warning
    try:
        code = command()
    except BrokenPipeError:  # the reader of our output has gone: say nothing, as other tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (ValueError, FetchError, OSError) as error:
        return _refuse(str(error) or type(error).__name__)
    except MemoryError as error:
        reason = str(error) or "use a smaller model or a smaller batch"
        return _refuse(f"out of memory: {reason}")
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("\nhispec: interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    print(f"hispec: {_line(message)}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Stands in for `warnings.showwarning`, which would print a place in the code."""
    print(f"hispec: warning: {_line(str(message))}", file=sys.stderr)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate memory, of an accelerator or of this machine."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _line(text: str) -> str:
    """A text of several lines as one, which any terminal can show."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return line.encode("utf-8", "backslashreplace").decode()
