"""Writable layers, snapshots and revision backups in memory, without files.

tests/unit/model_files.py extends them with files.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from gpudock_server.errors import LayerCarryFailed, SnapshotFailed
from gpudock_server.model.engine import EngineContainer, EngineImage, ImageAccounts
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind, SnapshotMethod
from gpudock_server.ports import (
    CommitCost,
    LayerPair,
    LayerStore,
    LayerTransferPlan,
    Progress,
    RevisionBackupStore,
    SnapshotPlan,
    SnapshotStore,
)
from typing_extensions import override

from tests.rpc.fakes import LONG_AGO


class FakeLayers(LayerStore):
    """Layers without files; every transfer succeeds."""

    image_accounts: ImageAccounts | None = None

    @override
    async def methods(self) -> tuple[tuple[LayerTransferMethod, str], ...]:
        return (
            (LayerTransferMethod.EXCHANGE, ""),
            (LayerTransferMethod.COPY, ""),
            (LayerTransferMethod.COMMIT, "unavailable in this fake"),
        )

    @override
    async def plan(self, old: EngineContainer) -> LayerTransferPlan:
        return LayerTransferPlan(method=LayerTransferMethod.EXCHANGE)

    @override
    async def accounts(self, image: EngineImage, upper_dir: str = "") -> ImageAccounts | None:
        return self.image_accounts

    @override
    async def commit_plan(self, container: EngineContainer) -> LayerTransferPlan:
        return LayerTransferPlan(method=LayerTransferMethod.COMMIT)

    @override
    async def commit_cost(self, container: EngineContainer) -> CommitCost:
        return CommitCost()

    @override
    async def require_committable(self, container: EngineContainer) -> None:
        return

    @override
    def report_commit_progress(
        self, container: EngineContainer, total: int, progress: Progress
    ) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    @override
    async def locate(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
        if old.id == new.id or old.image_id != new.image_id:
            raise LayerCarryFailed(method="EXCHANGE", detail="they must be two containers of the same image")
        return LayerPair(old_path="/old", old_inode=1, new_path="/new", new_inode=2)

    @override
    async def exchange(self, pair: LayerPair) -> bool:
        return True

    @override
    async def exchange_back(self, pair: LayerPair) -> None:
        return

    @override
    async def copy(self, pair: LayerPair, progress: Progress) -> None:
        return


class FakeRevisionBackups(RevisionBackupStore):
    """Backups in memory."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], RevisionBackup] = {}

    @override
    async def write(self, entry: RevisionBackup) -> None:
        self.entries[entry.key.uid, entry.number] = entry

    @override
    async def read(self, uid: str) -> tuple[RevisionBackup, ...]:
        return tuple(entry for (owner, _), entry in sorted(self.entries.items()) if owner == uid)

    @override
    async def delete(self, key: SnapshotKey) -> None:
        self.entries.pop((key.uid, key.revision), None)

    @override
    async def delete_all(self, uid: str) -> None:
        self.entries = {key: entry for key, entry in self.entries.items() if key[0] != uid}

    @override
    async def uids(self) -> tuple[str, ...]:
        return tuple({uid for uid, _ in self.entries})


Files = frozenset[str]
"""The names of the files in a container's writable layer."""


@dataclass(frozen=True)
class SealedSnapshot:
    """A sealed snapshot, and the operation that created it."""

    files: Files
    snapshot: Snapshot
    operation_id: str


class FakeSnapshots(SnapshotStore):
    """Snapshots of layers without files: sealed, partial, and those of the partial ones that are complete."""

    def __init__(self) -> None:
        self.sealed_snapshots: dict[SnapshotKey, SealedSnapshot] = {}
        self.partial: dict[tuple[SnapshotKey, str], Files] = {}
        self.completed: set[tuple[SnapshotKey, str]] = set()

    def files_of(self, container: EngineContainer) -> Files:  # noqa: ARG002 - subclasses have files
        """Return the files in the layer of a container."""
        return frozenset()

    def fill(self, container: EngineContainer, files: Files) -> None:
        """Set the files in the layer of a container."""

    def _sealed_by(self, key: SnapshotKey, operation_id: str) -> bool:
        return key in self.sealed_snapshots and self.sealed_snapshots[key].operation_id == operation_id

    @override
    async def method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        return SnapshotMethod.LINK, ""

    @override
    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        return SnapshotPlan(method=SnapshotMethod.LINK)

    @override
    async def gather(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        if not self._sealed_by(key, operation_id):
            self.partial[key, operation_id] = self.files_of(old)
            self.completed.discard((key, operation_id))

    @override
    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        if not self._sealed_by(key, operation_id):
            self.partial[key, operation_id] = self.files_of(old)
            self.completed.add((key, operation_id))

    @override
    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        if self._sealed_by(key, operation_id):
            return self.sealed_snapshots[key].snapshot
        if not image_id:
            raise SnapshotFailed(detail="the image id of the snapshot is missing")
        if (key, operation_id) not in self.completed:
            raise SnapshotFailed(detail="the snapshot is incomplete")
        files = self.partial[key, operation_id]
        self._drop_partial(key, operation_id)
        snapshot = Snapshot(
            kind=SnapshotKind.TREE,
            image_id=image_id,
            method=SnapshotMethod.LINK,
            layer_bytes=9,
            entries=len(files),
            create_time=LONG_AGO,
        )
        self.sealed_snapshots[key] = SealedSnapshot(files, snapshot, operation_id)
        return snapshot

    def _drop_partial(self, key: SnapshotKey, operation_id: str) -> None:
        self.partial.pop((key, operation_id), None)
        self.completed.discard((key, operation_id))

    @override
    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        self._drop_partial(key, operation_id)
        if self._sealed_by(key, operation_id):
            del self.sealed_snapshots[key]

    @override
    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        if key not in self.sealed_snapshots:
            raise SnapshotFailed(detail=f"no snapshot of revision {key.revision} on this node")
        sealed = self.sealed_snapshots[key]
        if target.image_id != sealed.snapshot.image_id:
            raise SnapshotFailed(
                detail=f"the snapshot is of image {sealed.snapshot.image_id}; the container has image {target.image_id}"
            )
        self._check_stopped(target)
        self.fill(target, sealed.files)

    @staticmethod
    def _check_stopped(target: EngineContainer) -> None:
        if target.running:
            raise SnapshotFailed(
                detail=f"container {target.id} is running; its layer can only be filled while it is stopped"
            )

    @override
    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        if source.id == target.id or source.image_id != target.image_id:
            raise SnapshotFailed(detail="they must be two containers of the same image")
        self._check_stopped(target)
        self.fill(target, self.files_of(source))

    @override
    async def remove(self, key: SnapshotKey) -> None:
        self.sealed_snapshots.pop(key, None)

    @override
    async def remove_all(self, uid: str) -> None:
        self.sealed_snapshots = {key: sealed for key, sealed in self.sealed_snapshots.items() if key.uid != uid}
        for key, operation_id in list(self.partial):
            if key.uid == uid:
                self._drop_partial(key, operation_id)

    @override
    async def sealed(self, key: SnapshotKey) -> Snapshot | None:
        return self.sealed_snapshots[key].snapshot if key in self.sealed_snapshots else None

    @override
    async def find(self) -> tuple[SnapshotKey, ...]:
        return tuple(self.sealed_snapshots)

    @override
    async def partials(self) -> tuple[tuple[SnapshotKey, str], ...]:
        return tuple(self.partial)
