"""Runs the `gpudock` command: `python -m gpudock.cli`."""

from gpudock.cli._main import main

main(prog_name="gpudock")
