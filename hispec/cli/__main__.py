"""`python -m hispec.cli` is the `hispec` command."""

from hispec.cli import main

main()
