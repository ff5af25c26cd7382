"""The docker command line of the engine's version, timed from outside of its process."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.rig import Rig, RigError
from tests.rig.engine import SYSTEM_PATH


class DockerCli:
    """Runs `docker` with the rig's engine, each time as a new process."""

    def __init__(self, rig: Rig) -> None:
        """Find the docker command of the engine's version, else the first on PATH. Raises RigError if there is none."""
        home = rig.folder / "docker-config"
        home.mkdir()
        # An empty configuration, without contexts, plugins and settings of the user.
        self._environment = os.environ | {"DOCKER_HOST": rig.engine.url, "DOCKER_CONFIG": str(home)}
        engine = rig.engine.call("GET", "/version")["Version"]
        found = {path: self._version_of(path) for path in _candidates()}
        if not found:
            raise RigError("there is no docker command line")
        self.path = next((path for path, version in found.items() if version == engine), next(iter(found)))
        self.version = found[self.path]

    def _version_of(self, path: str) -> str:
        words = [path, "version", "--format", "{{.Client.Version}}"]
        done = subprocess.run(words, check=False, capture_output=True, text=True, env=self._environment)
        return done.stdout.strip()

    async def time(self, *arguments: str) -> float:
        """Milliseconds from before the start of `docker` until its end."""
        return await asyncio.to_thread(self._time, [self.path, *arguments])

    async def time_shell(self, script: str) -> float:
        """Milliseconds of a shell script that calls `docker`, with the start of the shell."""
        folder = str(Path(self.path).parent)
        return await asyncio.to_thread(self._time, ["/bin/sh", "-euc", f'PATH="{folder}:$PATH"; {script}'])

    async def time_at_once(self, commands: Sequence[Sequence[str]]) -> float:
        """Milliseconds until several `docker` processes, started together, have ended."""
        before = time.perf_counter()
        await asyncio.gather(*(self.time(*arguments) for arguments in commands))
        return (time.perf_counter() - before) * 1e3

    async def time_first_byte(self, *arguments: str) -> float:
        """Milliseconds from before the start of `docker` until its first output."""
        return await asyncio.to_thread(self._time_first_byte, [self.path, *arguments])

    def _time(self, words: Sequence[str]) -> float:
        before = time.perf_counter()
        done = subprocess.run(words, check=False, capture_output=True, text=True, env=self._environment)
        after = time.perf_counter()
        if done.returncode:
            raise RigError(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return (after - before) * 1e3

    def _time_first_byte(self, words: Sequence[str]) -> float:
        before = time.perf_counter()
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=self._environment) as process:
            if process.stdout is None or not process.stdout.read(1):
                raise RigError(f"{' '.join(words)} has no output")
            after = time.perf_counter()
            process.stdout.read()
        return (after - before) * 1e3


def _candidates() -> Iterator[str]:
    folders = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}".split(":")
    for folder in dict.fromkeys(folders):
        if path := shutil.which("docker", path=folder):
            yield path
