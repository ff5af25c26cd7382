"""The folder of a volume backing, and the root that holds all of them.

    <root>/<uid>/volume.json     the VolumeBacking, and the VolumeIdentity of its volume; written before anything else,
                                 replaced atomically
    <root>/<uid>/image           LOOP: the filesystem, a sparse file
    <root>/<uid>/image.new       LOOP: an image that a killed daemon did not finish
    <root>/<uid>/device          LOOP: a symbolic link to the current /dev/loopN; the engine mounts it
    <root>/<uid>/mount           LOOP: where the daemon mounts it, in private mount namespaces
    <root>/<uid>/data            PROJECT_QUOTA: the files
    <root>/.removed-<uid>        a backing that is being deleted

The folder holds everything that is needed to attach volumes after a reboot, without etcd and the engine.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from gpudock_server.adapters.host.filesystem import sync_directory
from gpudock_server.adapters.host.stalls import StalledError
from gpudock_server.adapters.host.subprocesses import ProgramFailed
from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.host.trees.jobs import JobRefusedError
from gpudock_server.adapters.host.trees.limits import Limits, TreeTooLargeError
from gpudock_server.adapters.host.trees.worker import run_job
from gpudock_server.model.volume import BackingOnDisk, VolumeBackendKind, VolumeBacking, VolumeIdentity

_PRIVATE: Final = 0o700
_SCHEMA: Final = 1
_LIMITS: Final = Limits()
_REMOVED: Final = ".removed-"


class BackingDamaged(Exception):
    """The folder of a backing is damaged; the message says how."""


class BackingFolder:
    """The folder of one backing. `uid` must be a lower-case UUID, because it becomes part of paths."""

    def __init__(self, root: Path, uid: str) -> None:
        if str(uuid.UUID(uid)) != uid:
            raise ValueError(f"{uid!r} is not a lower-case UUID")
        if not root.is_absolute() or root == Path("/"):
            raise ValueError(f"volume root {root} must be an absolute path other than /")
        self.root = root
        self.uid = uid
        self.path = root / uid
        self.record = self.path / "volume.json"
        self.image = self.path / "image"
        self.unfinished = self.path / "image.new"
        self.device = self.path / "device"
        self.mount = self.path / "mount"
        self.data = self.path / "data"
        self._removed = root / f"{_REMOVED}{uid}"

    def read(self) -> VolumeBacking | None:
        """Read the backing; None if there is no record. Raises BackingDamaged."""
        recorded = self.recorded()
        return recorded[0] if recorded else None

    def recorded(self) -> tuple[VolumeBacking, VolumeIdentity | None] | None:
        """Read the backing and the identity of its volume; the identity is None if it was not recorded."""
        try:
            text = self.record.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            recorded = json.loads(text)
            if recorded["schema"] != _SCHEMA:
                raise BackingDamaged(f"{self.record} has schema {recorded['schema']}; this daemon supports {_SCHEMA}")
            backing = VolumeBacking.model_validate(recorded["backing"])
            kept = recorded.get("volume")
            identity = None if kept is None else VolumeIdentity.model_validate(kept)
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise BackingDamaged(f"{self.record} cannot be read") from error
        if backing.uid != self.uid:
            raise BackingDamaged(f"{self.record} belongs to backing {backing.uid}")
        return backing, identity

    def read_own(self, kind: VolumeBackendKind) -> VolumeBacking | None:
        """Read the backing; None if there is no record. Raises BackingDamaged, also if it is of another kind."""
        backing = self.read()
        if backing is not None and backing.kind is not kind:
            raise BackingDamaged(f"{self.path} is a volume of kind {backing.kind}, expected {kind}")
        return backing

    def write(self, backing: VolumeBacking, identity: VolumeIdentity | None = None) -> None:
        """Write the record to disk. Without an identity, the recorded one is kept."""
        self.root.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        self.path.mkdir(mode=_PRIVATE, exist_ok=True)
        if identity is None:
            with suppress(BackingDamaged):
                before = self.recorded()
                identity = before[1] if before else None
        recorded = {"schema": _SCHEMA, "backing": backing.model_dump(mode="json")}
        if identity is not None:
            recorded["volume"] = identity.model_dump(mode="json")
        text = json.dumps(recorded, indent=2)
        new = self.record.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.record)
        sync_directory(self.path)
        sync_directory(self.root)

    async def record_size(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """Write the record with another size; returns the changed backing."""
        changed = backing.model_copy(update={"size_bytes": size_bytes})
        await run_to_end(self.write, changed)
        return changed

    async def remove(self) -> None:
        """Delete the folder. It is renamed first, so that the rest that a killed daemon leaves can be recognized.

        A child process deletes the files, because folders of a tenant may be nested deeper than paths can be. Raises
        ProgramFailed.
        """
        for _ in range(2):
            # First delete what an earlier removal has left: the rename would fail otherwise.
            if await run_to_end(self._removed.is_dir):
                try:
                    await run_job(
                        "remove", memory_bytes=_LIMITS.memory_bytes, parent=str(self.root), name=self._removed.name
                    )
                except (JobRefusedError, StalledError, TreeTooLargeError) as error:
                    raise ProgramFailed(f"cannot delete {self._removed}: {error}") from error
            await run_to_end(self._set_aside)

    def _set_aside(self) -> None:
        with suppress(FileNotFoundError):
            self.path.rename(self._removed)
            sync_directory(self.root)


def backing_folders(root: Path) -> Iterator[BackingFolder]:
    """Iterate over the folders of all backings, including those without a readable record."""
    with suppress(FileNotFoundError):
        for path in sorted(root.iterdir()):
            with suppress(ValueError):
                yield BackingFolder(root, path.name)


def recorded_backings(root: Path) -> Iterator[VolumeBacking]:
    """Iterate over the readable backings."""
    for folder in backing_folders(root):
        with suppress(BackingDamaged):
            if backing := folder.read():
                yield backing


def backings_on_disk(root: Path, kind: VolumeBackendKind) -> tuple[BackingOnDisk, ...]:
    """Return the backings of one kind; if a record is damaged, the kind is derived from the content."""
    return tuple(one for folder in backing_folders(root) if (one := _stored(folder, kind)) is not None)


def _stored(folder: BackingFolder, kind: VolumeBackendKind) -> BackingOnDisk | None:
    try:
        recorded = folder.recorded()
    except BackingDamaged as error:
        shown = VolumeBackendKind.PROJECT_QUOTA if folder.data.exists() else VolumeBackendKind.LOOP
        return BackingOnDisk(uid=folder.uid, folder=str(folder.path), damage=str(error)) if shown is kind else None
    if recorded is None or recorded[0].kind is not kind:
        return None
    backing, identity = recorded
    content = folder.image if kind is VolumeBackendKind.LOOP else folder.data
    damage = "" if content.exists() else f"{content} does not exist"
    return BackingOnDisk(
        uid=folder.uid,
        folder=str(folder.path),
        backing=None if damage else backing,
        identity=identity,
        damage=damage,
    )
