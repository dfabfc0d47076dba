"""What the command lines share: parsing of values, and errors as one message with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def parse_depths(key: str, text: str | None) -> list[int] | None:
    """`6,12,30` as numbers.

    Raises:
        ValueError: anything else; the message names the key.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{key}={text!r} is not possible: write depths such as 6,12,30") from None


def parse_dtype(name: str) -> Any:
    """A torch dtype, or "auto".

    Raises:
        ValueError: an unknown name.
    """
    import torch

    known = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16,
             "float16": torch.float16}  # fmt: skip
    if name not in known:
        raise ValueError(f"dtype={name!r} is not possible: one of {', '.join(known)}")
    return known[name]


def parse_device(name: str | None) -> Any:
    """A torch device that this machine has, or None.

    Raises:
        ValueError: an unknown name, or a device that is not here.
    """
    import torch

    if name is None:
        return None
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} is not possible here: {reason}") from None


def run_cleanly(command: Callable[[], Any]) -> int:
    """Run `command`, which may return an exit code.

    What a user can mend becomes one message and exit code 2.
    """
    from hispec.utils.files import FetchError

    try:
        code = command()
    except (ValueError, FetchError, OSError) as error:
        print(f"hispec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhispec: interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0
