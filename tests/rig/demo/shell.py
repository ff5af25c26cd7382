"""Runs what the demo shows, and reads it back to verify it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.rig import Rig
from tests.rig.patience import limit

from .screen import Screen

_PATIENCE_S = 15.0
_POLL_S = 0.05


class UnexpectedResult(Exception):
    """Something is not as the demo says it is."""


def expect(condition: object, what: str) -> None:
    """Raises UnexpectedResult unless it holds."""
    if not condition:
        raise UnexpectedResult(f"expected {what}")


@dataclass(frozen=True)
class CommandOutput:
    """What a command wrote to stdout, and when each line of it came, in seconds of the monotonic clock."""

    text: str
    moments: tuple[float, ...]

    @property
    def lines(self) -> list[str]:
        """The lines without their ends."""
        return self.text.splitlines()

    @property
    def rows(self) -> list[dict[str, str]]:
        """The lines of a table below its headers, cell by cell; cells are aligned with their header."""
        header, *lines = self.lines or [""]
        columns = [(match[0], match.start()) for match in re.finditer(r"\S+", header)]
        ends = [start for _, start in columns[1:]] + [None]
        return [
            {name: line[start:end].strip() for (name, start), end in zip(columns, ends, strict=True)} for line in lines
        ]


class Shell:
    """A user's shell with GPUDOCK_ADDRESS set."""

    def __init__(self, screen: Screen, rig: Rig, address: str) -> None:
        self._screen = screen
        self._rig = rig
        columns = str(shutil.get_terminal_size().columns)
        self._environment = os.environ | {"GPUDOCK_ADDRESS": address, "COLUMNS": columns}
        self._environment.pop("GPUDOCK_TOKEN_FILE", None)

    def run(self, line: str) -> CommandOutput:
        """Shows a command and what it writes, while it does; raises UnexpectedResult if it fails."""
        self._screen.command(line)
        name, *words = shlex.split(line)
        program = [sys.executable, "-m", "gpudock.cli"] if name == "gpudock" else [name]
        lines: list[str] = []
        moments: list[float] = []
        # Progress is on stderr, which is the terminal itself: it redraws itself there.
        with subprocess.Popen(
            [*program, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._screen.fileno(),
            env=self._environment,
        ) as child:
            assert child.stdout is not None
            try:
                for text in map(bytes.decode, child.stdout):
                    moments.append(time.monotonic())
                    lines.append(text)
                    self._screen.output(text)
            except BaseException:
                child.kill()
                raise
        expect(child.returncode == 0, f"`{line}` to succeed; it ended with {child.returncode}")
        return CommandOutput("".join(lines), tuple(moments))

    def fetch(self, port: str) -> str:
        """Shows a request to a published port, from where the engine has it: the rig's network namespace."""
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + limit(_PATIENCE_S)
        # A container that has just started need not listen yet.
        while self._rig.run("timeout", "2", "busybox", "wget", "-qO-", address, check=False).returncode:
            expect(time.monotonic() < deadline, f"{address} to answer within {_PATIENCE_S:.0f} s")
            time.sleep(_POLL_S)
        namespace = f"nsenter --target {self._rig.namespaces.pid} --net"
        return self.run(f"{namespace} busybox wget -qO- {address}").text
