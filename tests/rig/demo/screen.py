"""The output of the demo: coloured on a terminal, plain text elsewhere."""

from __future__ import annotations

import io
import os
from typing import TextIO

_BOLD, _DIM, _GREEN, _RED, _CYAN = "1", "2", "32", "1;31", "1;36"


class Screen:
    """Writes to one stream, which the commands of the demo write to as well."""

    def __init__(self, out: TextIO) -> None:
        """Uses colours if `out` is a terminal or FORCE_COLOR is set, unless NO_COLOR is (https://no-color.org)."""
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")
        self._out = out
        requested = out.isatty() or bool(os.environ.get("FORCE_COLOR"))
        self._coloured = requested and not os.environ.get("NO_COLOR")
        self._steps = 0

    def fileno(self) -> int:
        """The descriptor of the stream, after a flush."""
        self._out.flush()
        return self._out.fileno()

    def title(self, text: str) -> None:
        """Write the title of the demo."""
        self._line(text, _BOLD)

    def step(self, text: str) -> None:
        """Write the heading of the next step."""
        self._steps += 1
        self._line(f"\n── {self._steps}. {text}", _CYAN)

    def command(self, line: str) -> None:
        """Write a command as a user types it."""
        first, *rest = line.split("\n")
        self._line("\n".join([f"$ {first}", *(f"> {each}" for each in rest)]), _BOLD)

    def output(self, text: str) -> None:
        """Write output of a command."""
        self._out.write(text)
        self._out.flush()

    def verified(self, text: str) -> None:
        """Write what was verified."""
        self._line(f"✓ {text}", _GREEN)

    def remark(self, text: str) -> None:
        """Write a remark."""
        self._line(text, _DIM)

    def fail(self, text: str) -> None:
        """Write why the demo ends early."""
        self._line(f"\n✗ {text}", _RED)

    def _line(self, text: str, colour: str) -> None:
        self.output(f"\x1b[{colour}m{text}\x1b[0m\n" if self._coloured else f"{text}\n")
