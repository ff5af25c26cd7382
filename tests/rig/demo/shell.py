"""Runs and shows the commands of the demo, and returns their output."""

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

_ANSWER_SECONDS = 15.0
_POLL_S = 0.05


class UnexpectedResult(Exception):
    """A result of the demo is not the expected one."""


def expect(condition: object, what: str) -> None:
    """Raise UnexpectedResult unless `condition` is true."""
    if not condition:
        raise UnexpectedResult(f"expected {what}")


@dataclass(frozen=True)
class CommandOutput:
    """The stdout of a command, and the time of each line in seconds of the monotonic clock."""

    text: str
    times: tuple[float, ...]

    @property
    def lines(self) -> list[str]:
        """The lines without line ends."""
        return self.text.splitlines()

    @property
    def rows(self) -> list[dict[str, str]]:
        """The rows of a table, by column; each cell begins below its header."""
        header, *lines = self.lines or [""]
        columns = [(match[0], match.start()) for match in re.finditer(r"\S+", header)]
        ends = [start for _, start in columns[1:]] + [None]
        return [
            {name: line[start:end].strip() for (name, start), end in zip(columns, ends, strict=True)} for line in lines
        ]


class Shell:
    """The shell of a user, with GPUDOCK_ADDRESS set."""

    def __init__(self, screen: Screen, rig: Rig, address: str) -> None:
        self._screen = screen
        self._rig = rig
        columns = str(shutil.get_terminal_size().columns)
        self._environment = os.environ | {"GPUDOCK_ADDRESS": address, "COLUMNS": columns}
        self._environment.pop("GPUDOCK_TOKEN_FILE", None)

    def run(self, line: str) -> CommandOutput:
        """Run a command, and show it and its output as it comes. Raises UnexpectedResult if the command fails."""
        self._screen.command(line)
        name, *words = shlex.split(line)
        program = [sys.executable, "-m", "gpudock.cli"] if name == "gpudock" else [name]
        lines: list[str] = []
        times: list[float] = []
        # Progress is written to stderr, which is the terminal itself, so that it can be redrawn there.
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
                    times.append(time.monotonic())
                    lines.append(text)
                    self._screen.output(text)
            except BaseException:
                child.kill()
                raise
        expect(child.returncode == 0, f"`{line}` to succeed; it ended with {child.returncode}")
        return CommandOutput("".join(lines), tuple(times))

    def fetch(self, port: str) -> str:
        """Request / of a published port in the rig's network namespace, and show it. Returns the answer."""
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + limit(_ANSWER_SECONDS)
        # A container that has just started may not listen yet.
        while self._rig.run("timeout", "2", "busybox", "wget", "-qO-", address, check=False).returncode:
            expect(time.monotonic() < deadline, f"{address} to answer within {_ANSWER_SECONDS:.0f} s")
            time.sleep(_POLL_S)
        namespace = f"nsenter --target {self._rig.namespaces.pid} --net"
        return self.run(f"{namespace} busybox wget -qO- {address}").text
