"""The `hispec` command. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import sys

import typer

from hispec.cli.checkpoints import (
    compile_checkpoint,
    export,
    import_drafter,
    inspect,
    merge,
    report,
)
from hispec.cli.decode import generate, plan
from hispec.cli.hub import fetch, pull, push
from hispec.cli.serve import serve
from hispec.utils.command_line import run_cleanly

__all__ = ["app", "main"]

app = typer.Typer(
    help="Early-exit models and hierarchical speculative decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("compile")(compile_checkpoint)
for command in (
    fetch,
    generate,
    serve,
    plan,
    report,
    export,
    import_drafter,
    merge,
    inspect,
    push,
    pull,
):
    app.command()(command)


def main() -> None:
    """Run the command line; the console script calls this."""
    sys.exit(run_cleanly(app))
