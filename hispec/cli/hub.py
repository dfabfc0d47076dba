"""Commands that bring models here or send them away: fetch, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hispec.base_models.registry import BASES
from hispec.cli.options import out


def fetch(
    name: Annotated[str, typer.Argument(help=f"{', '.join(BASES)}, or a Hub id")],
    root: Annotated[Path, typer.Option(help="where base models are kept")] = Path(
        "checkpoints/base"
    ),
) -> None:
    """Put a base model on this machine as a plain transformers folder."""
    from hispec.base_models.fetch import fetch as fetch_base

    fetch_base(name, root, say=out.say)


def push(
    checkpoint: Annotated[Path, typer.Argument(help="folder of an EE checkpoint")],
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the Hub")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="of a new repository; private by default"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="branch, created if it is new; default: main")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the files, print the card, contact nobody")
    ] = False,
) -> None:
    """Verify an EE checkpoint and upload it to the Hugging Face Hub in one commit."""
    from hispec.hub.push import push as push_checkpoint

    push_checkpoint(
        checkpoint, repo, private=private, revision=revision, dry_run=dry_run, say=out.say
    )


def pull(
    repo: Annotated[str, typer.Argument(help="ORG/NAME or ORG/NAME@REVISION on the Hub")],
    folder: Annotated[
        Path | None, typer.Argument(help="where to; default: checkpoints/ORG--NAME")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
) -> None:
    """Download an EE checkpoint from the Hugging Face Hub and verify it, whole or not at all."""
    from hispec.hub.pull import pull as pull_checkpoint

    pull_checkpoint(repo, folder, revision=revision, say=out.say)
