"""Writable layers, snapshots, host paths and volumes of a host in memory, which keep what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from gpudock_server.errors import LayerCarryFailed, SnapshotFailed
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind, SnapshotMethod
from gpudock_server.model.volume import TreeSummary, VolumeBackendKind, VolumeBacking, VolumeIdentity, VolumeUsage
from gpudock_server.ports import CommitCost, LayerPair, LayerTransferPlan, Progress, ShrinkNeedsCopy, SnapshotPlan
from typing_extensions import override

from tests.rpc.fake_volumes import FakeCopier, FakeVolumes
from tests.rpc.fakes import FakeLayers, FakeSnapshots
from tests.unit.faults import Faults
from tests.unit.model_engine import Files, ModelEngine

_START = datetime(2024, 1, 1, tzinfo=UTC)


class ModelLayers(FakeLayers):
    """Carries layers by `method`; where `same_quota` is not so, an exchange is refused."""

    def __init__(self, engine: ModelEngine) -> None:
        self.engine = engine
        self.method = LayerTransferMethod.EXCHANGE
        self.same_quota = True
        self.cost = CommitCost(measured=True, apparent_bytes=10, allocated_bytes=10, entries=1, bytes_available=1 << 30)

    @override
    async def plan(self, old: EngineContainer) -> LayerTransferPlan:
        async with self.engine.faults.call("layers.plan"):
            return LayerTransferPlan(
                method=self.method, bytes_to_move=5, bytes_available=50, warnings=("it is a test",)
            )

    @override
    async def commit_plan(self, container: EngineContainer) -> LayerTransferPlan:
        async with self.engine.faults.call("layers.commit_plan"):
            return LayerTransferPlan(method=LayerTransferMethod.COMMIT, bytes_to_move=6, bytes_available=60)

    @override
    async def commit_cost(self, container: EngineContainer) -> CommitCost:
        async with self.engine.faults.call("layers.commit_cost"):
            return self.cost

    @override
    async def require_committable(self, container: EngineContainer) -> None:
        async with self.engine.faults.call("layers.require_committable"):
            assert container.id in self.engine.containers

    def _still(self, *engine_ids: str) -> None:
        for one in engine_ids:
            if self.engine.containers[one].running:
                raise AssertionError(f"{one} runs while its layer is moved")

    @override
    async def locate(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
        async with self.engine.faults.call("layers.locate"):
            if old.image_id != new.image_id:
                raise LayerCarryFailed(method="EXCHANGE", detail="they are of different images")
            numbers = self.engine.layer_of
            return LayerPair(old_path=old.id, old_inode=numbers[old.id], new_path=new.id, new_inode=numbers[new.id])

    def _swap(self, pair: LayerPair, first: int, second: int) -> None:
        self._still(pair.old_path, pair.new_path)
        self.engine.layer_of[pair.old_path], self.engine.layer_of[pair.new_path] = first, second

    @override
    async def exchange(self, pair: LayerPair) -> bool:
        async with self.engine.faults.call("layers.exchange"):
            if self.same_quota:
                self._swap(pair, pair.new_inode, pair.old_inode)
            return self.same_quota

    @override
    async def exchange_back(self, pair: LayerPair) -> None:
        async with self.engine.faults.call("layers.exchange_back"):
            if self.engine.layer_of[pair.old_path] != pair.old_inode:
                self._swap(pair, pair.old_inode, pair.new_inode)

    @override
    async def copy(self, pair: LayerPair, progress: Progress) -> None:
        async with self.engine.faults.call("layers.copy"):
            self._still(pair.old_path, pair.new_path)
            self.engine.layers[pair.new_inode] = self.engine.layers[pair.old_inode]
            progress(5, 5)


class ModelSnapshots(FakeSnapshots):
    """Trees of files, sealed ones (`sealed_files`) and partial ones (`partial`)."""

    def __init__(self, engine: ModelEngine) -> None:
        super().__init__()
        self.engine = engine
        self.how: tuple[SnapshotMethod | None, str] = (SnapshotMethod.LINK, "")
        self.cost = SnapshotPlan(method=SnapshotMethod.LINK, bytes_to_copy=7, bytes_available=70)
        self.sealed_files: dict[SnapshotKey, tuple[Files, Snapshot, str]] = {}
        self.partial: dict[tuple[SnapshotKey, str], Files] = {}
        # What is raised when the layer is looked at, one after the other.
        self.surprises: dict[str, Exception] = {}

    def _layer(self, container: EngineContainer) -> Files:
        return self.engine.layers[self.engine.layer_of[container.id]]

    @override
    async def method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        async with self.engine.faults.call("snapshots.method"):
            assert old.id in self.engine.containers
            return self.how

    @override
    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        async with self.engine.faults.call("snapshots.plan"):
            assert old.id in self.engine.containers
            return self.cost

    def _surprise(self, name: str) -> None:
        if name in self.surprises:
            raise self.surprises[name]

    @override
    async def gather(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        async with self.engine.faults.call("snapshots.gather"):
            self._surprise("gather")
            assert previous is None or previous in self.sealed_files
            self.partial[key, operation_id] = self._layer(old)
            progress(3, 3)

    @override
    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        async with self.engine.faults.call("snapshots.complete"):
            self._surprise("complete")
            assert self.engine.containers[old.id].state is not EngineState.RUNNING, "its files are written to"
            self.partial[key, operation_id] = self._layer(old)
            progress(4, 4)

    @override
    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        async with self.engine.faults.call("snapshots.seal"):
            if key not in self.sealed_files:
                made = Snapshot(
                    kind=SnapshotKind.TREE,
                    image_id=image_id,
                    method=SnapshotMethod.LINK,
                    layer_bytes=9,
                    create_time=_START,
                )
                self.sealed_files[key] = (self.partial.pop((key, operation_id)), made, operation_id)
            return self.sealed_files[key][1]

    @override
    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        async with self.engine.faults.call("snapshots.discard"):
            self.partial.pop((key, operation_id), None)
            if key in self.sealed_files and self.sealed_files[key][2] == operation_id:
                del self.sealed_files[key]

    @override
    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        async with self.engine.faults.call("snapshots.restore"):
            if key not in self.sealed_files:
                raise SnapshotFailed(detail="it was not kept")
            files, made, _ = self.sealed_files[key]
            assert self.engine.containers[target.id].start_time is None, "it has run"
            assert made.image_id == target.image_id
            self.engine.layers[self.engine.layer_of[target.id]] = files
            progress(6, 6)

    @override
    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        async with self.engine.faults.call("snapshots.mirror"):
            self._surprise("mirror")
            running = self.engine.containers[source.id].state is EngineState.RUNNING
            assert not (still and running), "its files are written to"
            assert self.engine.containers[target.id].start_time is None, "it has run"
            # What is written while it runs comes with the last pass alone.
            seen = self._layer(source)
            self.engine.layers[self.engine.layer_of[target.id]] = seen if still else seen - {"late"}
            progress(8, 8)

    @override
    async def remove(self, key: SnapshotKey) -> None:
        async with self.engine.faults.call("snapshots.remove"):
            self.sealed_files.pop(key, None)

    @override
    async def remove_all(self, uid: str) -> None:
        async with self.engine.faults.call("snapshots.remove_all"):
            self.sealed_files = {key: one for key, one in self.sealed_files.items() if key.uid != uid}
            self.partial = {key: one for key, one in self.partial.items() if key[0].uid != uid}

    @override
    async def sealed(self, key: SnapshotKey) -> Snapshot | None:
        return self.sealed_files[key][1] if key in self.sealed_files else None

    @override
    async def find(self) -> tuple[SnapshotKey, ...]:
        return tuple(self.sealed_files)

    @override
    async def partials(self) -> tuple[tuple[SnapshotKey, str], ...]:
        return tuple(self.partial)


@dataclass
class ModelHostPaths:
    """Host paths below /data may be mounted."""

    faults: Faults
    bound: dict[str, set[str]] = field(default_factory=dict)
    renewed: list[bool] = field(default_factory=list)

    async def check(self, paths: Sequence[str]) -> None:
        """Whether each may be mounted."""
        assert all(path.startswith("/data") for path in paths)

    async def bind(self, name: str, paths: Sequence[str], *, renew: bool = True) -> dict[str, str]:
        """Bind each for an engine container."""
        async with self.faults.call("host_paths.bind"):
            if paths:
                self.bound.setdefault(name, set()).update(paths)
                self.renewed.append(renew)
            return {path: self.source(name, path) for path in paths}

    def source(self, name: str, path: str) -> str:
        """What the engine is given."""
        return f"/bound/{name}{path}"

    async def release(self, name: str) -> None:
        """Undo all that was bound for an engine container."""
        async with self.faults.call("host_paths.release"):
            self.bound.pop(name, None)

    async def names(self) -> frozenset[str]:
        """The engine containers that something is bound for."""
        return frozenset(self.bound)


@dataclass(eq=False)
class ModelVolumes(FakeVolumes):
    """Stores by their uid: the size, and which content they hold. A shrink needs a copy if `copies`."""

    faults: Faults = field(default_factory=Faults)
    engine: ModelEngine | None = None
    stores: dict[str, tuple[int, str]] = field(default_factory=dict)
    copies: bool = False
    identities: dict[str, VolumeIdentity | None] = field(default_factory=dict)

    @override
    async def create(
        self, uid: str, name: str, size_bytes: int, identity: VolumeIdentity | None = None
    ) -> VolumeBacking:
        async with self.faults.call("volumes.create"):
            backing = await super().create(uid, name, size_bytes, identity)
            self.stores.setdefault(uid, (size_bytes, f"of {name}"))
            self.identities[uid] = identity
            return backing

    def _resized(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        self.stores[backing.uid] = (size_bytes, self.stores[backing.uid][1])
        return backing.model_copy(update={"size_bytes": size_bytes})

    @override
    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        async with self.faults.call("volumes.grow"):
            return self._resized(backing, size_bytes)

    @override
    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        async with self.faults.call("volumes.shrink"):
            if self.copies:
                raise ShrinkNeedsCopy("it cannot shrink where it is")
            return self._resized(backing, size_bytes)

    @override
    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:
        return self.copies

    @override
    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        async with self.faults.call("volumes.replacement"):
            self.stores.setdefault(uid, (size_bytes, "empty"))
            return backing.model_copy(update={"uid": uid, "size_bytes": size_bytes, "engine_volume": f"gpudock-{uid}"})

    @override
    async def content(self, backing: VolumeBacking) -> str:
        async with self.faults.call("volumes.content"):
            return self.stores[backing.uid][1]

    @override
    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        async with self.faults.call("volumes.exchange"):
            if self.stores[holder.uid][1] == content:
                return
            mounted = {holder.engine_volume, other.engine_volume}
            for one in self.engine.containers.values() if self.engine else ():
                assert not (one.alive and mounted & set(one.volumes.values())), "it is mounted"
            first, second = self.stores[holder.uid], self.stores[other.uid]
            assert second[1] == content
            self.stores[holder.uid], self.stores[other.uid] = second, first
            assert (self.stores[holder.uid][0], self.stores[other.uid][0]) == (holder.size_bytes, other.size_bytes)

    @override
    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        async with self.faults.call("volumes.usage"):
            return await super().usage(backing)

    @override
    async def destroy(self, backing: VolumeBacking) -> None:
        async with self.faults.call("volumes.destroy"):
            self.stores.pop(backing.uid, None)


class ModelPlain(ModelVolumes):
    """Volumes without a size."""

    @property
    @override
    def kind(self) -> VolumeBackendKind:
        return VolumeBackendKind.PLAIN


class ModelCopier(FakeCopier):
    """Copies contents; the copy of a volume's is called so."""

    def __init__(self, volumes: ModelVolumes) -> None:
        self.volumes = volumes
        # Of each copy, whether it was the last one.
        self.passes: list[bool] = []

    def _content(self, source: VolumeBacking) -> str:
        return self.volumes.stores.get(source.uid, (0, f"of {source.engine_volume}"))[1]

    @override
    async def copy(self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, final: bool) -> None:
        async with self.volumes.faults.call("copier.copy"):
            size, _ = self.volumes.stores[target.uid]
            self.volumes.stores[target.uid] = (size, f"copy of {self._content(source)}")
            self.passes.append(final)
            progress(1, 1)

    @override
    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        assert self.volumes.stores[target.uid][1] == f"copy of {self._content(source)}"
        return await super().verify(source, target)
