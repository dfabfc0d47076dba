"""Hierarchical speculative decoding for `model.generate(..., custom_generate=THIS_FOLDER)`.

Copied into every full EE checkpoint. All the work is done by the package `hispec`.
"""

from typing import Any

EXITS_SHA256 = ""
"""Of the exits in the folder that this file was copied to; set by the copying."""


def generate(model: Any, **arguments: Any) -> Any:
    """Decode as transformers' `generate` does, with the exits of the checkpoint of this file.

    Raises:
        ImportError: the package `hispec` is not installed.
    """
    try:
        from hispec.generation import generate_with_exits
    except ImportError as error:
        raise ImportError(
            "this checkpoint decodes through its early exits with the package hispec, which cannot "
            f"be imported here ({error}): pip install -U hispec, or leave out custom_generate "
            "to decode with the full model alone"
        ) from error
    return generate_with_exits(model, EXITS_SHA256, **arguments)
