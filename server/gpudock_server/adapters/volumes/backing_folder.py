"""A store's folder, and the root that all of them lie in.

    <root>/<uid>/volume.json     the VolumeBacking, and the VolumeIdentity of the volume whose own store it is; written
                                 before anything else is made, replaced atomically
    <root>/<uid>/image           LOOP: the filesystem, a sparse file
    <root>/<uid>/image.new       LOOP: one that a killed daemon had not finished
    <root>/<uid>/device          LOOP: a symbolic link to the /dev/loopN of today; what the engine mounts
    <root>/<uid>/mount           LOOP: where the daemon mounts it, in namespaces that nobody else sees
    <root>/<uid>/data            PROJECT_QUOTA: the files
    <root>/.removed-<uid>        a store that is being deleted

Everything needed to make volumes ready after a reboot is in here: no etcd and no engine has to answer for that.
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
    """A store's folder does not hold what it must; the text says what."""


class BackingFolder:
    """The folder of one store. `uid` must be a UUID in its usual form: no other text becomes part of a path."""

    def __init__(self, root: Path, uid: str) -> None:
        if str(uuid.UUID(uid)) != uid:
            raise ValueError(f"{uid!r} is not a UUID in its usual form")
        if not root.is_absolute() or root == Path("/"):
            raise ValueError(f"{root} cannot hold volumes")
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
        """What was recorded here; None where nothing was. Raises BackingDamaged."""
        recorded = self.recorded()
        return recorded[0] if recorded else None

    def recorded(self) -> tuple[VolumeBacking, VolumeIdentity | None] | None:
        """As `read`, with the volume whose own store it is; None for that where it was not recorded."""
        try:
            text = self.record.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            recorded = json.loads(text)
            if recorded["schema"] != _SCHEMA:
                raise BackingDamaged(f"{self.record} was written by another version of this daemon")
            backing = VolumeBacking.model_validate(recorded["backing"])
            kept = recorded.get("volume")
            identity = None if kept is None else VolumeIdentity.model_validate(kept)
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise BackingDamaged(f"{self.record} cannot be read") from error
        if backing.uid != self.uid:
            raise BackingDamaged(f"{self.record} is of another volume, {backing.uid}")
        return backing, identity

    def read_own(self, kind: VolumeBackendKind) -> VolumeBacking | None:
        """What was recorded here by a backend of this kind. Raises BackingDamaged, also where it was another."""
        backing = self.read()
        if backing is not None and backing.kind is not kind:
            raise BackingDamaged(f"{self.path} is a store of kind {backing.kind}")
        return backing

    def write(self, backing: VolumeBacking, identity: VolumeIdentity | None = None) -> None:
        """Record what this store is; on return it is on the disk. Without an identity, the recorded one stays."""
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

    async def remove(self) -> None:
        """Delete all of it: out of the way first, so that what a killed daemon leaves is seen to be rubbish.

        A child process does the deleting: a tenant may have nested folders deeper than a path can be. Raises
        ProgramFailed when it fails.
        """
        for _ in range(2):
            # First what an earlier removal has left, which the rename would otherwise run into.
            if await run_to_end(self._removed.is_dir):
                try:
                    await run_job(
                        "remove", memory_bytes=_LIMITS.memory_bytes, parent=str(self.root), name=self._removed.name
                    )
                except (JobRefusedError, StalledError, TreeTooLargeError) as error:
                    raise ProgramFailed(f"{self._removed} could not be deleted: {error}") from error
            await run_to_end(self._set_aside)

    def _set_aside(self) -> None:
        with suppress(FileNotFoundError):
            self.path.rename(self._removed)
            sync_directory(self.root)


def backing_folders(root: Path) -> Iterator[BackingFolder]:
    """Every store in the root, also those without a readable record."""
    with suppress(FileNotFoundError):
        for path in sorted(root.iterdir()):
            with suppress(ValueError):
                yield BackingFolder(root, path.name)


def recorded_backings(root: Path) -> Iterator[VolumeBacking]:
    """What is recorded in the root; damaged stores are left out."""
    for folder in backing_folders(root):
        with suppress(BackingDamaged):
            if backing := folder.read():
                yield backing


def backings_on_disk(root: Path, kind: VolumeBackendKind) -> tuple[BackingOnDisk, ...]:
    """The stores of one kind; one whose record is damaged is of the kind that its content shows."""
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
    damage = "" if content.exists() else f"{content} is gone"
    return BackingOnDisk(
        uid=folder.uid,
        folder=str(folder.path),
        backing=None if damage else backing,
        identity=identity,
        damage=damage,
    )


def sync_directory(path: Path) -> None:
    """Have a rename or a new name in a folder survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
