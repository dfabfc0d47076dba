"""Hierarchical speculative decoding for `model.generate(..., custom_generate=THIS_FOLDER)`.

Copied into every full EE checkpoint. All the work is done by the package `hispec`.
"""

from typing import Any


def generate(model: Any, **arguments: Any) -> Any:
    """As transformers' `generate`, with the exits of the checkpoint this file lies in.

    Raises:
        ImportError: the package `hispec` is not installed.
    """
    try:
        from hispec.generation import generate as with_exits
    except ImportError as error:
        raise ImportError(
            "this checkpoint decodes through its early exits with the package hispec, which cannot "
            f"be imported here ({error}): pip install hispec, or leave out custom_generate to "
            "decode with the full model alone"
        ) from error
    return with_exits(model, **arguments)
