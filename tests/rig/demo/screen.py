"""What the demo looks like: coloured on a terminal, plain text anywhere else."""

from __future__ import annotations

import io
import os
from typing import TextIO

_BOLD, _DIM, _GREEN, _RED, _CYAN = "1", "2", "32", "1;31", "1;36"


class Screen:
    """Writes to one stream, which the commands that are shown write to as well."""

    def __init__(self, out: TextIO) -> None:
        """Uses colours if `out` is a terminal or FORCE_COLOR is set, unless NO_COLOR is (https://no-color.org)."""
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")
        self._out = out
        wanted = out.isatty() or bool(os.environ.get("FORCE_COLOR"))
        self._coloured = wanted and not os.environ.get("NO_COLOR")
        self._steps = 0

    def fileno(self) -> int:
        """The descriptor, with everything before it written."""
        self._out.flush()
        return self._out.fileno()

    def title(self, text: str) -> None:
        """What it is about."""
        self._line(text, _BOLD)

    def step(self, text: str) -> None:
        """A new part of the story."""
        self._steps += 1
        self._line(f"\n── {self._steps}. {text}", _CYAN)

    def command(self, line: str) -> None:
        """What a user would type."""
        first, *rest = line.split("\n")
        self._line("\n".join([f"$ {first}", *(f"> {each}" for each in rest)]), _BOLD)

    def output(self, text: str) -> None:
        """What a command writes, as it comes."""
        self._out.write(text)
        self._out.flush()

    def good(self, text: str) -> None:
        """What was verified."""
        self._line(f"✓ {text}", _GREEN)

    def say(self, text: str) -> None:
        """A remark."""
        self._line(text, _DIM)

    def fail(self, text: str) -> None:
        """Why the demo ends early."""
        self._line(f"\n✗ {text}", _RED)

    def _line(self, text: str, colour: str) -> None:
        self.output(f"\x1b[{colour}m{text}\x1b[0m\n" if self._coloured else f"{text}\n")
