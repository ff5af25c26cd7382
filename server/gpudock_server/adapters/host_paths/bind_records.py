"""What is to be bound again after a reboot, on disk: one file for each engine container.

    <state_dir>/host-paths/<engine container>.json

No store and no engine has to answer before the engine starts its containers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

_PRIVATE: Final = 0o700
_SCHEMA: Final = 1
_SUFFIX: Final = ".json"


class BindRecordDamaged(Exception):
    """A record cannot be read; the text says which."""


class BindRecords:
    """The records of one daemon."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        """Whether there is a record for an engine container."""
        return self._path(name).exists()

    def names(self) -> Iterator[str]:
        """Of every engine container that has a record, readable or not."""
        if self._folder.is_dir():
            yield from sorted(path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"*{_SUFFIX}"))

    def read(self, name: str) -> tuple[str, ...]:
        """The host paths of an engine container. Raises BindRecordDamaged."""
        path = self._path(name)
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            if recorded["schema"] != _SCHEMA:
                raise BindRecordDamaged(f"{path} was written by another version of this daemon")
            return tuple(str(each) for each in recorded["paths"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BindRecordDamaged(f"{path} cannot be read: {error}") from error

    def write(self, name: str, paths: Sequence[str]) -> None:
        """Record them; on return the record is on the disk."""
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
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        """Forget an engine container."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{require_container_name(name)}{_SUFFIX}"


def require_container_name(name: str) -> str:
    """The name of an engine container, which becomes part of a path. Raises ValueError."""
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise ValueError(f"{name!r} is no name of an engine container")
    return name
