"""The folders of snapshots, and their names.

    <root>/<uid>/<revision>/                             a sealed snapshot:
        tree/                                            the files of the layer
        index                                            the states of the originals (see snapshot_index)
        meta.json                                        written last; without it the snapshot is not sealed
    <root>/<uid>/<revision>.partial-<operation id>/      a partial snapshot
    <root>/<uid>/<revision>.removed-<any>/               is being removed; likewise <root>/<uid>.removed-<any>

All paths are built here, from a checked uid, a number and a checked operation id only.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from gpudock_server.adapters.host.filesystem import open_directory, sync_directory
from gpudock_server.adapters.host.trees.jobs import TREE_NAME
from gpudock_server.adapters.host.trees.snapshot_index import remove_index
from gpudock_server.model.record import Record
from gpudock_server.model.snapshot import Snapshot, SnapshotKey

META_NAME = "meta.json"
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_NUMBER = r"[1-9][0-9]{0,17}"
_PARTIAL = re.compile(rf"(?P<revision>{_NUMBER})\.partial-(?P<operation>{_UUID})")


class Meta(Record):
    """The meta file of a sealed snapshot."""

    key: SnapshotKey
    operation_id: str
    snapshot: Snapshot


class SnapshotFolders:
    """The folders of all snapshots below one root."""

    def __init__(self, root: str) -> None:
        if not root.startswith("/") or root == "/" or os.path.normpath(root) != root:
            raise ValueError(f"snapshot root {root!r} must be an absolute, normalized path")
        self.root = Path(root)

    def sealed(self, key: SnapshotKey) -> Path:
        """Return the folder of a sealed snapshot."""
        return self._of(key.uid) / f"{key.revision:d}"

    def partial(self, key: SnapshotKey, operation_id: str) -> Path:
        """Return the folder of a partial snapshot."""
        return self._of(key.uid) / f"{key.revision:d}.partial-{require_uuid(operation_id)}"

    def make(self, folder: Path) -> None:
        """Create the folder of a partial snapshot and its parents, accessible by root only."""
        for each in (self.root, folder.parent, folder, folder / TREE_NAME):
            # The parent of the root exists: the engine's data folder, or a folder that the operator chose.
            with suppress(FileExistsError):
                each.mkdir(mode=0o700)

    def meta(self, key: SnapshotKey) -> Meta | None:
        """Read the meta file of a sealed snapshot; None if there is none. Raises ValueError if it is not readable."""
        try:
            text = (self.sealed(key) / META_NAME).read_bytes()
        except FileNotFoundError:
            return None
        meta = Meta.model_validate_json(text)
        if meta.key != key:
            raise ValueError(f"{self.sealed(key)} belongs to snapshot {meta.key}, expected {key}")
        return meta

    def seal(self, folder: Path, meta: Meta) -> None:
        """Write the meta file into the folder of a partial snapshot and rename that to its final name, durably."""
        temporary = folder / f"{META_NAME}.new"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(meta.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / META_NAME)
        sync_directory(folder)
        folder.rename(self.sealed(meta.key))
        sync_directory(folder.parent)

    def remove_index_of(self, folder: Path) -> bool:
        """Remove the index of a partial snapshot, which then cannot be resumed; False if its folder does not exist."""
        try:
            with open_directory(folder) as descriptor:
                remove_index(descriptor)
        except FileNotFoundError:
            return False
        return True

    def set_aside(self, folder: Path) -> list[Path]:
        """Rename a folder before its removal, so that it does not count as complete; returns the folders to remove."""
        parent, name = folder.parent, folder.name
        with suppress(FileNotFoundError):
            folder.rename(parent / f"{name}.removed-{secrets.token_hex(8)}")
            sync_directory(parent)
        return sorted(parent.glob(f"{name}.removed-*"))

    def of_container(self, uid: str) -> Path:
        """Return the folder of all snapshots of a container."""
        return self._of(uid)

    def remove_if_empty(self, folder: Path) -> None:
        """Remove the container's folder, the parent of `folder`, if it is empty."""
        with suppress(OSError):
            if folder.parent != self.root:
                folder.parent.rmdir()

    def found(self) -> Iterator[tuple[SnapshotKey, str]]:
        """Iterate over all snapshots: the key, and the operation of a partial snapshot (empty: sealed)."""
        for folder in sorted(self.root.glob("*/*")):
            partial = _PARTIAL.fullmatch(folder.name)
            number = partial["revision"] if partial else folder.name
            try:
                key = SnapshotKey(uid=folder.parent.name, revision=int(number) if re.fullmatch(_NUMBER, number) else 0)
            except ValidationError:
                continue
            if partial:
                yield key, partial["operation"]
            elif (folder / META_NAME).is_file():
                yield key, ""

    def _of(self, uid: str) -> Path:
        return self.root / require_uuid(uid)


def require_uuid(name: str) -> str:
    """Return `name` if it is a lower-case UUID, which is safe in a path. Raises ValueError."""
    if not re.fullmatch(_UUID, name):
        raise ValueError(f"{name!r} is not a lower-case UUID")
    return name
