"""What the commands share: the terminal, and options that several of them have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hispec.utils.command_line import parse_depths, parse_device, parse_dtype
from hispec.utils.console import Output

if TYPE_CHECKING:
    from hispec.lm import EarlyExitLM

out = Output()

Base = Annotated[str | None, typer.Option(help="where the checkpoint's base is")]
Exits = Annotated[
    str | None, typer.Option(help="for a plain model: depths to read as exits, e.g. 6,12")
]
Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16, float16, or auto (as stored, where that is fast)"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Backend = Annotated[
    str, typer.Option(help="what runs the passes: eager, openvino, or auto (the faster one)")
]
Weights = Annotated[
    str, typer.Option(help="full, or int8: weights are rounded, and read faster; needs float32")
]
Data = Annotated[
    Path | None, typer.Option(help="JSONL of prompts like yours; default: our own small set")
]


def load_model(
    checkpoint: str | Path,
    *,
    dtype: str,
    device: str | None,
    base: str | None,
    backend: str,
    weights: str = "full",
    exits: str | None = None,
) -> EarlyExitLM:
    """Load a model as the options say; its engine says on standard error what takes seconds."""
    from hispec.lm import load

    lm = load(
        checkpoint,
        dtype=parse_dtype(dtype),
        device=parse_device(device),
        exits=parse_depths("exits", exits),
        base=base,
        backend=backend,
        weights=weights,
    )
    if lm.model.engine is not None:
        lm.model.engine.say = Output(stderr=True).say
    return lm
