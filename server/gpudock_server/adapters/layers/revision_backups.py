"""RevisionBackupStore in the folders of the snapshots: files `<root>/<uid>/<revision>.json`."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from gpudock_server.adapters.host.disk_space import available
from gpudock_server.adapters.host.filesystem import sync_directory
from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.layers.snapshot_folders import require_uuid
from gpudock_server.errors import DiskFull, SnapshotFailed
from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.snapshot import SnapshotKey
from gpudock_server.ports import RevisionBackupStore

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_SCHEMA: Final = 1
_NO_SPACE_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NUMBERED: Final = re.compile(r"[1-9][0-9]{0,17}\.json")


class FolderRevisionBackupStore(RevisionBackupStore):
    """Implements ports.RevisionBackupStore. `root` is created with the first backup."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def write(self, entry: RevisionBackup) -> None:
        """See the protocol. Returns after the backup is on disk."""
        with self._snapshot_errors():
            await run_to_end(self._write, entry)

    async def read(self, uid: str) -> tuple[RevisionBackup, ...]:
        """See the protocol."""
        with self._snapshot_errors():
            return await run_to_end(lambda: tuple(self._entries(uid)))

    async def delete(self, key: SnapshotKey) -> None:
        """See the protocol."""
        with self._snapshot_errors():
            await run_to_end(self._delete, key)

    async def delete_all(self, uid: str) -> None:
        """See the protocol."""
        with self._snapshot_errors():
            await run_to_end(self._delete_all, uid)

    async def uids(self) -> tuple[str, ...]:
        """See the protocol."""
        with self._snapshot_errors():
            return await run_to_end(lambda: tuple(self._uids()))

    def _write(self, entry: RevisionBackup) -> None:
        path = self._path(entry.key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"schema": _SCHEMA, "entry": entry.model_dump(mode="json")}))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_directory(path.parent)

    def _entries(self, uid: str) -> Iterator[RevisionBackup]:
        folder = self._root / require_uuid(uid)
        names = [name for name in _names(folder) if _NUMBERED.fullmatch(name)]
        for name in sorted(names, key=lambda name: int(name.removesuffix(".json"))):
            try:
                recorded = json.loads((folder / name).read_text(encoding="utf-8"))
                entry = RevisionBackup.model_validate(recorded["entry"]) if recorded["schema"] == _SCHEMA else None
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError, ValidationError):
                entry = None
            if entry is None or (entry.revision.uid, f"{entry.number}.json") != (uid, name):
                log.warning("unreadable revision backup skipped", path=str(folder / name))
            else:
                yield entry

    def _delete(self, key: SnapshotKey) -> None:
        path = self._path(key)
        with suppress(FileNotFoundError):
            path.unlink()
            sync_directory(path.parent)

    def _delete_all(self, uid: str) -> None:
        folder = self._root / require_uuid(uid)
        for name in _names(folder):
            if _NUMBERED.fullmatch(name):
                (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # the folder may contain snapshots
            folder.rmdir()

    def _uids(self) -> Iterator[str]:
        for name in sorted(_names(self._root)):
            with suppress(ValueError):
                yield require_uuid(name)

    def _path(self, key: SnapshotKey) -> Path:
        return self._root / require_uuid(key.uid) / f"{key.revision:d}.json"

    @contextmanager
    def _snapshot_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE_ERRNOS:
                raise DiskFull(
                    path=str(self._root), needed_bytes=0, available_bytes=available(str(self._root))
                ) from error
            raise SnapshotFailed(detail=f"{error.strerror} ({error.filename})") from error
        except ValueError as error:
            raise SnapshotFailed(detail=str(error)) from error


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
