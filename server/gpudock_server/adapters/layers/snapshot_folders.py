"""Where snapshots lie, and which names there are whose.

    <root>/<uid>/<revision>/                             a sealed snapshot:
        tree/                                            the files of the layer
        index                                            what they were copied from (see snapshot_index)
        meta.json                                        written last; without it nothing is sealed
    <root>/<uid>/<revision>.partial-<operation id>/      one that is being made
    <root>/<uid>/<revision>.removed-<any>/               one that is being removed; likewise <root>/<uid>.removed-<any>

Every path is put together here, of a checked uid, a number and a checked operation id, and of nothing else.
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
    """What stands beside a sealed tree."""

    key: SnapshotKey
    operation_id: str
    snapshot: Snapshot


class SnapshotFolders:
    """The folders below one root."""

    def __init__(self, root: str) -> None:
        if not root.startswith("/") or root == "/" or os.path.normpath(root) != root:
            raise ValueError(f"{root!r} is no folder for snapshots: it must be absolute and normalized")
        self.root = Path(root)

    def sealed(self, key: SnapshotKey) -> Path:
        """The folder of a sealed snapshot."""
        return self._of(key.uid) / f"{key.revision:d}"

    def partial(self, key: SnapshotKey, operation_id: str) -> Path:
        """The folder of one that an operation is making."""
        return self._of(key.uid) / f"{key.revision:d}.partial-{require_uuid(operation_id)}"

    def make(self, folder: Path) -> None:
        """Make a partial's folder and those above it, for root alone."""
        for each in (self.root, folder.parent, folder, folder / TREE_NAME):
            # Above the root is the engine's data folder, or what an operator chose: that is there.
            with suppress(FileExistsError):
                each.mkdir(mode=0o700)

    def meta(self, key: SnapshotKey) -> Meta | None:
        """What is known of a sealed snapshot; None when there is none. Raises ValueError when it is not readable."""
        try:
            text = (self.sealed(key) / META_NAME).read_bytes()
        except FileNotFoundError:
            return None
        meta = Meta.model_validate_json(text)
        if meta.key != key:
            raise ValueError(f"{self.sealed(key)} holds {meta.key}")
        return meta

    def seal(self, folder: Path, meta: Meta) -> None:
        """Write the meta file into a partial's folder and give that its final name, all on the disk."""
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
        """Remove the index of a partial's folder: it cannot be resumed any more. False when there is no such folder."""
        try:
            with open_directory(folder) as descriptor:
                remove_index(descriptor)
        except FileNotFoundError:
            return False
        return True

    def set_aside(self, folder: Path) -> list[Path]:
        """Rename a folder away, so that nobody takes it for whole; the folders to be removed then."""
        parent, name = folder.parent, folder.name
        with suppress(FileNotFoundError):
            folder.rename(parent / f"{name}.removed-{secrets.token_hex(8)}")
            sync_directory(parent)
        return sorted(parent.glob(f"{name}.removed-*"))

    def of_container(self, uid: str) -> Path:
        """The folder with everything of a container."""
        return self._of(uid)

    def remove_if_empty(self, folder: Path) -> None:
        """Remove the container's folder that `folder` was in, if that was the last."""
        with suppress(OSError):
            if folder.parent != self.root:
                folder.parent.rmdir()

    def found(self) -> Iterator[tuple[SnapshotKey, str]]:
        """Every key with a folder, and the operation that it is partial for (empty: it is sealed)."""
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
    """The same text, which is then fit to be a part of a path. Raises ValueError."""
    if not re.fullmatch(_UUID, name):
        raise ValueError(f"{name!r} is no UUID in lower case with dashes")
    return name
