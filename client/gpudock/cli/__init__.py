"""The `gpudock` command."""

from gpudock.cli._main import main

__all__ = ["main"]
