"""What the commands share: the terminal, and options that several of them have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hispec.utils.console import Output

out = Output()

Base = Annotated[str | None, typer.Option(help="where the checkpoint's base is")]
Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16, float16, or auto (as stored, where that is fast)"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Backend = Annotated[
    str, typer.Option(help="what runs the passes: eager, openvino, or auto (the faster one)")
]
Data = Annotated[
    Path | None, typer.Option(help="JSONL of prompts like yours; default: our own small set")
]
