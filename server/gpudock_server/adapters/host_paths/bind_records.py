"""Records of the host paths to bind again after a reboot, one file for each engine container.

    <state_dir>/host-paths/<engine container>.json

They are on disk because the paths are bound before the engine starts, and without the store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.filesystem import sync_directory

_PRIVATE: Final = 0o700
_SCHEMA: Final = 1
_SUFFIX: Final = ".json"


class BindRecordDamaged(Exception):
    """A record cannot be read; the message says which and why."""


class BindRecords:
    """The bind records of one daemon."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        """Whether an engine container has a record."""
        return self._path(name).exists()

    def names(self) -> Iterator[str]:
        """Iterate over the names of all engine containers with a record, readable or not."""
        if self._folder.is_dir():
            yield from sorted(path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"*{_SUFFIX}"))

    def read(self, name: str) -> tuple[str, ...]:
        """Read the host paths of an engine container. Raises BindRecordDamaged."""
        path = self._path(name)
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            if recorded["schema"] != _SCHEMA:
                raise BindRecordDamaged(f"{path} has schema {recorded['schema']}; this daemon supports {_SCHEMA}")
            return tuple(str(each) for each in recorded["paths"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BindRecordDamaged(f"{path} cannot be read: {error}") from error

    def write(self, name: str, paths: Sequence[str]) -> None:
        """Write the record of an engine container to disk."""
        path = self._path(name)
        text = json.dumps({"schema": _SCHEMA, "paths": list(paths)}) + "\n"
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") == text:
            return
        self._folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_directory(self._folder)

    def remove(self, name: str) -> None:
        """Remove the record of an engine container."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{require_container_name(name)}{_SUFFIX}"


def require_container_name(name: str) -> str:
    """Return `name` if it is safe in a path. Raises ValueError."""
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise ValueError(f"invalid engine container name {name!r}")
    return name
