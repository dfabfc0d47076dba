"""The `hispec` command."""

from hispec.cli.commands import app, main

__all__ = ["app", "main"]
