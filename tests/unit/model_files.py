"""Writable layers, snapshots, host paths and volumes of a host in memory, with their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gpudock_server.errors import DiskFull, LayerCarryFailed
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotMethod
from gpudock_server.model.volume import TreeSummary, VolumeBacking, VolumeIdentity, VolumeUsage
from gpudock_server.ports import CommitCost, LayerPair, LayerTooLarge, LayerTransferPlan, Progress, SnapshotPlan
from typing_extensions import override

from tests.rpc.fake_layers import FakeLayers, FakeSnapshots, Files
from tests.rpc.fake_volumes import FakeCopier, FakePlainVolumes, FakeVolumes
from tests.unit.faults import Faults
from tests.unit.model_engine import ModelEngine


class ModelLayers(FakeLayers):
    """Transfers layers by `method`. Without `same_quota` an exchange is refused."""

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

    def _require_stopped(self, *engine_ids: str) -> None:
        for engine_id in engine_ids:
            assert not self.engine.containers[engine_id].running, f"{engine_id} runs while its layer is moved"

    @override
    async def locate(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
        async with self.engine.faults.call("layers.locate"):
            await super().locate(old, new)
            numbers = self.engine.layer_of
            if missing := {old.id, new.id} - numbers.keys():
                raise LayerCarryFailed(method="EXCHANGE", detail=f"no layer of containers {sorted(missing)}")
            return LayerPair(old_path=old.id, old_inode=numbers[old.id], new_path=new.id, new_inode=numbers[new.id])

    def _swap(self, pair: LayerPair, first: int, second: int) -> None:
        self._require_stopped(pair.old_path, pair.new_path)
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
            self._require_stopped(pair.old_path, pair.new_path)
            if self.engine.layer_of[pair.old_path] != pair.old_inode:
                raise LayerCarryFailed(method="COPY", detail="the layers are exchanged")
            self.engine.layers[pair.new_inode] = self.engine.layers[pair.old_inode]
            progress(5, 5)


class ModelSnapshots(FakeSnapshots):
    """Snapshots of the files of containers of `engine`. `failures` are raised by the methods that they name."""

    def __init__(self, engine: ModelEngine) -> None:
        super().__init__()
        self.engine = engine
        self.method_result: tuple[SnapshotMethod | None, str] = (SnapshotMethod.LINK, "")
        self.cost = SnapshotPlan(method=SnapshotMethod.LINK, bytes_to_copy=7, bytes_available=70)
        self.failures: dict[str, Exception] = {}

    @override
    def files_of(self, container: EngineContainer) -> Files:
        return self.engine.layers[self.engine.layer_of[container.id]]

    @override
    def fill(self, container: EngineContainer, files: Files) -> None:
        assert self.engine.containers[container.id].start_time is None, "its process has run"
        self.engine.layers[self.engine.layer_of[container.id]] = files

    @override
    async def method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        async with self.engine.faults.call("snapshots.method"):
            assert old.id in self.engine.containers
            return self.method_result

    @override
    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        async with self.engine.faults.call("snapshots.plan"):
            assert old.id in self.engine.containers
            return self.cost

    def _raise_failure(self, name: str, key: SnapshotKey, operation_id: str) -> None:
        if name in self.failures:
            if isinstance(self.failures[name], DiskFull | LayerTooLarge):
                self._drop_partial(key, operation_id)
            raise self.failures[name]

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
            self._raise_failure("gather", key, operation_id)
            await super().gather(old, key, operation_id, previous, progress)
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
            self._raise_failure("complete", key, operation_id)
            assert self.engine.containers[old.id].state is not EngineState.RUNNING, "its process may write to its files"
            await super().complete(old, key, operation_id, previous, progress)
            progress(4, 4)

    @override
    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        async with self.engine.faults.call("snapshots.seal"):
            return await super().seal(key, operation_id, image_id)

    @override
    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        async with self.engine.faults.call("snapshots.discard"):
            await super().discard(key, operation_id)

    @override
    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        async with self.engine.faults.call("snapshots.restore"):
            await super().restore(key, target, progress)
            progress(6, 6)

    @override
    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        async with self.engine.faults.call("snapshots.mirror"):
            if "mirror" in self.failures:
                raise self.failures["mirror"]
            running = self.engine.containers[source.id].state is EngineState.RUNNING
            assert not (still and running), "its process may write to its files"
            await super().mirror(source, target, operation_id, still=still, progress=progress)
            if not still:
                # Files that are written while the source runs are copied by the last pass only.
                self.fill(target, self.files_of(target) - {"late"})
            progress(8, 8)

    @override
    async def remove(self, key: SnapshotKey) -> None:
        async with self.engine.faults.call("snapshots.remove"):
            await super().remove(key)

    @override
    async def remove_all(self, uid: str) -> None:
        async with self.engine.faults.call("snapshots.remove_all"):
            await super().remove_all(uid)


@dataclass
class ModelHostPaths:
    """Host paths; those below /data may be mounted."""

    faults: Faults
    bound: dict[str, set[str]] = field(default_factory=dict)
    renewed: list[bool] = field(default_factory=list)

    async def check(self, paths: Sequence[str]) -> None:
        """Fail unless each path may be mounted."""
        assert all(path.startswith("/data") for path in paths)

    async def bind(self, name: str, paths: Sequence[str], *, renew: bool = True) -> dict[str, str]:
        """Bind each path for an engine container; return the source of each."""
        async with self.faults.call("host_paths.bind"):
            if paths:
                self.bound.setdefault(name, set()).update(paths)
                self.renewed.append(renew)
            return {path: self.source(name, path) for path in paths}

    def source(self, name: str, path: str) -> str:
        """Return the path that the engine mounts."""
        return f"/bound/{name}{path}"

    async def release(self, name: str) -> None:
        """Remove all binds of an engine container."""
        async with self.faults.call("host_paths.release"):
            self.bound.pop(name, None)

    async def names(self) -> frozenset[str]:
        """Return the names of the engine containers with binds."""
        return frozenset(self.bound)


@dataclass(eq=False)
class ModelVolumes(FakeVolumes):
    """Volumes with a size, whose calls can fail. The containers of `engine` mount them."""

    faults: Faults = field(default_factory=Faults)
    engine: ModelEngine | None = None

    @override
    def mounted(self, backing: VolumeBacking) -> bool:
        volume = self.backings.get(backing.uid, backing).engine_volume
        containers = self.engine.containers.values() if self.engine else ()
        return super().mounted(backing) or any(
            container.alive and volume in container.volumes.values() for container in containers
        )

    @override
    async def create(
        self, uid: str, name: str, size_bytes: int, identity: VolumeIdentity | None = None
    ) -> VolumeBacking:
        async with self.faults.call("volumes.create"):
            return await super().create(uid, name, size_bytes, identity)

    @override
    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        async with self.faults.call("volumes.grow"):
            return await super().grow(backing, size_bytes)

    @override
    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        async with self.faults.call("volumes.shrink"):
            return await super().shrink(backing, size_bytes)

    @override
    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        async with self.faults.call("volumes.replacement"):
            return await super().replacement(backing, uid, size_bytes)

    @override
    async def content(self, backing: VolumeBacking) -> str:
        async with self.faults.call("volumes.content"):
            return await super().content(backing)

    @override
    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        async with self.faults.call("volumes.exchange"):
            await super().exchange(holder, other, content)

    @override
    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        async with self.faults.call("volumes.usage"):
            return await super().usage(backing)

    @override
    async def destroy(self, backing: VolumeBacking) -> None:
        async with self.faults.call("volumes.destroy"):
            await super().destroy(backing)


class ModelPlainVolumes(ModelVolumes, FakePlainVolumes):
    """Volumes without a size, whose calls can fail."""


class ModelCopier(FakeCopier):
    """Copies the contents of volumes; the content of a copy is `copy of` that of its source."""

    def __init__(self, volumes: ModelVolumes) -> None:
        self.volumes = volumes
        # `final` of each copy.
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
