"""Completions of `gpudock`, requested as the scripts of the three shells do."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.clients.command import DEADLINE, CommandResult, wait_for_result
from tests.rig.patience import limit

GPUDOCK = str(Path(sys.executable).with_name("gpudock"))
SHELLS = ("bash", "zsh", "fish")
_BUSY_MACHINE_SECONDS = 30.0


async def proposals(shell: str, address: str, line: str, timeout: float = _BUSY_MACHINE_SECONDS) -> list[str]:
    """Return the completions of the last word of `line`, without descriptions; fail if anything else is printed."""
    result = await run_completion(shell, address, line, timeout)
    assert (result.code, result.err) == (0, ""), result
    # click prints an empty line at the end, which the scripts drop.
    lines = result.out.rstrip("\n").splitlines()
    if shell == "zsh":
        assert len(lines) % 3 == 0, result
        return [
            value.replace("\\:", ":") for kind, value in zip(lines[::3], lines[1::3], strict=True) if kind == "plain"
        ]
    pairs = [line.split(",", 1) for line in lines]
    return [value.partition("\t")[0] for kind, value in pairs if kind == "plain"]


async def run_completion(shell: str, address: str, line: str, timeout: float = _BUSY_MACHINE_SECONDS) -> CommandResult:
    """Return the result of the command for `line`."""
    words = line.split(" ")
    last = words[-1]
    at = last if shell == "fish" else str(len(words) - 1)
    environment = os.environ | {
        "GPUDOCK_ADDRESS": address,
        "_GPUDOCK_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": at,
        "GPUDOCK_COMPLETION_TIMEOUT": str(timeout),
    }
    pipe = asyncio.subprocess.PIPE
    return await wait_for_result(
        await asyncio.create_subprocess_exec(GPUDOCK, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
    )


async def bash(script: str, address: str) -> str:
    """Return the output of a bash script with gpudock in its PATH."""
    path = f"{Path(GPUDOCK).parent}:{os.environ['PATH']}"
    environment = os.environ | {
        "GPUDOCK_ADDRESS": address,
        "GPUDOCK_COMPLETION_TIMEOUT": str(_BUSY_MACHINE_SECONDS),
        "PATH": path,
    }
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("bash", "-ec", script, env=environment, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(process.communicate(), limit(DEADLINE))
    assert (process.returncode, err) == (0, b""), (out, err)
    return out.decode()
