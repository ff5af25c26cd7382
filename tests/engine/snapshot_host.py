"""A data folder of an engine with layers that tests make themselves, and a snapshot store over it."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path

from gpudock_server.adapters.layers import OverlaySnapshotStore
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import new_operation_id
from gpudock_server.model.snapshot import SnapshotKey

from tests.engine.sample_trees import create_layer_folders

IMAGE_ID = f"sha256:{1:064x}"
UID = str(uuid.UUID(int=7))
"""The uid of the container whose snapshots are made."""


def ignore_progress(_current: int, _total: int) -> None:
    """A progress callback that does nothing."""


def snapshot_key(revision: int) -> SnapshotKey:
    """The key of the snapshot of a revision."""
    return SnapshotKey(uid=UID, revision=revision)


def container_of(upper: Path, state: EngineState = EngineState.EXITED) -> EngineContainer:
    """An engine container whose writable layer is the folder `upper`."""
    return EngineContainer(
        id=upper.parent.name,
        name="planted",
        image_id=IMAGE_ID,
        state=state,
        pid=0,
        exit_code=0,
        oom_killed=False,
        error="",
        labels={},
        gpu_uuids=(),
        upper_dir=str(upper),
        storage_driver="overlay2",
    )


class SnapshotHost:
    """A data folder of an engine with the empty layers of two containers, `old` and `new`, and a snapshot store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers = create_layer_folders(root, 1, 2)
        (root / "gpudock").mkdir()
        self.snapshots = root / "gpudock/snapshots"
        self.store = self.fresh_store()
        self.old, self.new = map(container_of, self.layers)
        self.running = dataclasses.replace(self.old, state=EngineState.RUNNING)
        """The container `old` while it runs."""

    def fresh_store(self) -> OverlaySnapshotStore:
        """A store without state in memory, as a daemon has it after its start."""
        return OverlaySnapshotStore(str(self.snapshots), str(self.root), local=True)

    def tree(self, revision: int) -> Path:
        """The folder with the files of a sealed snapshot."""
        return self.snapshots / UID / str(revision) / "tree"

    async def make_snapshot(self, revision: int, previous: int = 0) -> str:
        """Make and seal a snapshot of `old`, after that of revision `previous`; returns the id of the operation."""
        operation_id, key = new_operation_id(), snapshot_key(revision)
        before = snapshot_key(previous) if previous else None
        await self.store.gather(self.running, key, operation_id, before, ignore_progress)
        await self.store.complete(self.old, key, operation_id, before, ignore_progress)
        await self.store.seal(key, operation_id, IMAGE_ID)
        return operation_id
