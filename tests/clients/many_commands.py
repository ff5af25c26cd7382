"""Runs many command lines of `gpudock` in one process, which is faster than a process for each.

Reads a JSON list of argument lists from stdin, and writes a JSON list of [exit code, stdout, stderr].
"""

from __future__ import annotations

import asyncio
import json
import sys

from click.testing import CliRunner
from gpudock.cli import main

from tests.clients.command import DEADLINE, CommandResult
from tests.rig.patience import limit


async def run_all(address: str, command_lines: list[list[str]]) -> list[CommandResult]:
    """Run command lines one after the other against the daemon at `address`; return their results."""
    pipe = asyncio.subprocess.PIPE
    program = (sys.executable, "-m", "tests.clients.many_commands")
    process = await asyncio.create_subprocess_exec(*program, stdin=pipe, stdout=pipe)
    request = json.dumps([["--address", address, *words] for words in command_lines]).encode()
    out, _ = await asyncio.wait_for(process.communicate(request), limit(DEADLINE * len(command_lines)))
    return [CommandResult(*result) for result in json.loads(out)]


def _run(words: list[str]) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, words, prog_name="gpudock")
    return result.exit_code, result.stdout, result.stderr


if __name__ == "__main__":
    json.dump([_run(words) for words in json.load(sys.stdin)], sys.stdout)
