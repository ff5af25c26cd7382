"""An engine, cards and processes in memory, for what a real one does not do on demand: hang, fail, be slow.

They keep the promises of `ports` that the RPCs lean on and no more.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from gpudock_server.errors import (
    EngineRejected,
    GpudockError,
    ImageNotFound,
    LayerCarryFailed,
    SnapshotFailed,
    VolumeExists,
)
from gpudock_server.model.engine import (
    LABEL_OPERATION,
    LABEL_UID,
    EngineContainer,
    EngineContainerSpec,
    EngineEvent,
    EngineImage,
    EngineInfo,
    EngineState,
    EngineVolume,
    ExecRequest,
    ExecStatus,
    ExecStream,
    ImageAccounts,
    RegistryAuth,
)
from gpudock_server.model.gpu import Gpu, GpuReport
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind, SnapshotMethod
from gpudock_server.model.spec import RestartPolicy
from gpudock_server.ports import (
    CommitCost,
    Engine,
    ExecSession,
    GpuInventory,
    LayerPair,
    LayerStore,
    LayerTransferPlan,
    ProcessControl,
    Progress,
    RevisionBackupStore,
    SnapshotPlan,
    SnapshotStore,
)
from typing_extensions import override

IMAGE = "busybox:latest"
_IMAGE_ID = "sha256:" + "a" * 64


class FakeSession(ExecSession):
    """A process that says what a test puts into `output` (None: the end), and takes what it is given."""

    def __init__(self, request: ExecRequest) -> None:
        self.request = request
        self.output: asyncio.Queue[tuple[ExecStream, bytes] | None] = asyncio.Queue()
        self.exit_code: int | None = None
        self.written: list[bytes] = []
        self.sizes: list[tuple[int, int]] = []
        self.stdin_closed = asyncio.Event()
        self.closed = asyncio.Event()
        self.taken = 0
        self.takes_stdin = asyncio.Event()
        self.takes_stdin.set()

    def say(self, data: bytes, stream: ExecStream = ExecStream.STDOUT) -> None:
        """Write to an output."""
        self.output.put_nowait((stream, data))

    def end(self, exit_code: int | None) -> None:
        """Be over."""
        self.exit_code = exit_code
        self.output.put_nowait(None)

    @override
    async def read(self) -> AsyncIterator[tuple[ExecStream, bytes]]:
        while (chunk := await self.output.get()) is not None:
            self.taken += 1
            yield chunk

    @override
    async def write(self, data: bytes) -> None:
        await self.takes_stdin.wait()
        self.written.append(data)

    @override
    async def close_stdin(self) -> None:
        self.stdin_closed.set()

    @override
    async def resize(self, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    @override
    async def status(self) -> ExecStatus:
        return ExecStatus(running=self.exit_code is None, exit_code=self.exit_code, pid=4711)

    @override
    async def close(self) -> None:
        self.closed.set()


@dataclass
class FakeEngine(Engine):
    """An engine whose calls a test can hold (`gates`) or fail (`failures`), by the method's name.

    It keeps the states of containers. What it does not do stands in tests/contracts/test_engine.py.
    """

    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    failures: dict[str, GpudockError] = field(default_factory=dict)
    containers: dict[str, EngineContainer] = field(default_factory=dict)
    volumes: dict[str, EngineVolume] = field(default_factory=dict)
    sessions: asyncio.Queue[FakeSession] = field(default_factory=asyncio.Queue)
    pull_progress: list[tuple[int, int]] = field(default_factory=list)
    has_image: bool = True
    made_images: set[str] = field(default_factory=set)

    def _rejected(self, call: str, detail: str, status: int = 409) -> EngineRejected:
        return EngineRejected(call=call, status=status, detail=detail)

    def _there(self, engine_id: str, call: str) -> EngineContainer:
        if engine_id not in self.containers:
            raise self._rejected(call, f"no such container: {engine_id}", 404)
        return self.containers[engine_id]

    def _named(self, name: str, operation: str | None, call: str) -> str | None:
        """The id of the container of this name, if the same operation made it. Raises EngineRejected otherwise."""
        for one in self.containers.values():
            if one.name == name:
                if operation is None or one.labels.get(LABEL_OPERATION) != operation:
                    raise self._rejected(call, f"the name {name} is in use")
                return one.id
        return None

    async def _call(self, name: str) -> None:
        if name in self.gates:
            await self.gates[name].wait()
        if name in self.failures:
            raise self.failures[name]

    def _set(self, engine_id: str, state: EngineState) -> None:
        self.containers[engine_id] = replace(self.containers[engine_id], state=state)

    @override
    async def info(self) -> EngineInfo:
        await self._call("info")
        return EngineInfo(
            id="E", version="27.0", api_version="1.47", storage_driver="overlay2", root_dir="/", cpus=2, memory_bytes=8
        )

    @override
    async def image(self, reference: str) -> EngineImage | None:
        return EngineImage(id=_IMAGE_ID) if reference in (IMAGE, _IMAGE_ID) and self.has_image else None

    @override
    async def image_ids(self) -> tuple[str, ...]:
        return (_IMAGE_ID,) if self.has_image else ()

    @override
    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        for current, total in self.pull_progress:
            progress(current, total)
            await asyncio.sleep(0)
        await self._call("pull")
        self.has_image = True

    @override
    async def image_names(self) -> tuple[str, ...]:
        return (IMAGE,) if self.has_image else ()

    @override
    async def volume_names(self) -> tuple[str, ...]:
        return tuple(self.volumes)

    @override
    async def has_volume(self, name: str) -> bool:
        return name in self.volumes

    @override
    async def mounting(self, volume: str) -> tuple[EngineContainer, ...]:
        return ()

    @override
    async def create_volume(
        self, name: str, *, labels: Mapping[str, str], driver_options: Mapping[str, str]
    ) -> EngineVolume:
        found = self.volumes.get(name)
        if found is None:
            self.volumes[name] = found = EngineVolume(
                name=name,
                driver="local",
                mountpoint=f"/engine/{name}",
                labels=dict(labels),
                options=dict(driver_options),
            )
        if found.labels.get(LABEL_UID) != labels.get(LABEL_UID) or found.options != dict(driver_options):
            raise VolumeExists(volume=name)
        return found

    @override
    async def find_volumes(self, labels: Mapping[str, str]) -> tuple[EngineVolume, ...]:
        return tuple(one for one in self.volumes.values() if labels.items() <= one.labels.items())

    @override
    async def inspect_volume(self, name: str) -> EngineVolume | None:
        return self.volumes.get(name)

    @override
    async def remove_volume(self, name: str) -> None:
        self.volumes.pop(name, None)

    @override
    async def create(self, engine_spec: EngineContainerSpec) -> str:
        await self._call("create")
        operation = engine_spec.labels.get(LABEL_OPERATION)
        if found := self._named(engine_spec.name, operation, "create a container"):
            return found
        if engine_spec.image_id not in (_IMAGE_ID, *self.made_images):
            raise ImageNotFound(image=engine_spec.spec.image)
        engine_id = uuid.uuid4().hex
        self.containers[engine_id] = EngineContainer(
            id=engine_id,
            name=engine_spec.name,
            image_id=engine_spec.image_id,
            state=EngineState.CREATED,
            pid=0,
            exit_code=0,
            oom_killed=False,
            error="",
            labels=engine_spec.labels,
            gpu_uuids=engine_spec.placement.gpu_uuids,
        )
        return engine_id

    @override
    async def inspect(self, engine_id: str) -> EngineContainer | None:
        return next((seen for seen in self.containers.values() if engine_id in (seen.id, seen.name)), None)

    @override
    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        return tuple(
            one
            for one in self.containers.values()
            if all(key in one.labels and value in ("", one.labels[key]) for key, value in labels.items())
        )

    @override
    async def start(self, engine_id: str) -> None:
        await self._call("start")
        if self._there(engine_id, "start").state is EngineState.PAUSED:
            raise self._rejected("start", "cannot start a paused container, try unpause instead")
        self._set(engine_id, EngineState.RUNNING)

    @override
    async def stop(self, engine_id: str, timeout: float) -> None:
        await self._call("stop")
        if engine_id in self.containers and self.containers[engine_id].alive:
            self._set(engine_id, EngineState.EXITED)

    @override
    async def pause(self, engine_id: str) -> None:
        if not self._there(engine_id, "pause").alive:
            raise self._rejected("pause", "container is not running")
        self._set(engine_id, EngineState.PAUSED)

    @override
    async def unpause(self, engine_id: str) -> None:
        if not self._there(engine_id, "unpause").alive:
            raise self._rejected("unpause", "container is not paused")
        self._set(engine_id, EngineState.RUNNING)

    @override
    async def update(
        self,
        engine_id: str,
        *,
        cpus: float,
        memory_bytes: int,
        pids_limit: int = 0,
        restart_policy: RestartPolicy | None = None,
    ) -> None:
        await self._call("update")
        self._there(engine_id, "update")

    @override
    async def rename(self, engine_id: str, name: str) -> None:
        await self._call("rename")
        seen = self._there(engine_id, "rename")
        if any(one.name == name and one.id != engine_id for one in self.containers.values()):
            raise self._rejected("rename", f"the name {name} is in use")
        self.containers[engine_id] = replace(seen, name=name)

    @override
    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        seen = self._there(engine_id, "wait")
        return None if seen.alive else seen.exit_code

    @override
    async def remove(self, engine_id: str, *, own_volumes: bool = False) -> None:
        await self._call("remove")
        self.containers.pop(engine_id, None)

    @override
    async def commit(
        self,
        engine_id: str,
        reference: str,
        labels: Mapping[str, str],
        *,
        author: str = "",
        comment: str = "",
        changes: Sequence[str] = (),
        config_of: str = "",
    ) -> str:
        await self._call("commit")
        self._there(engine_id, "commit")
        return self._made_image("b")

    def _made_image(self, digit: str) -> str:
        self.made_images.add("sha256:" + digit * 64)
        return "sha256:" + digit * 64

    @override
    async def create_file_holder(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        return "shadow"

    @override
    async def tag(self, image: str, reference: str) -> None:
        await self._call("tag")

    @override
    async def replace_config(self, image_id: str, other_id: str, reference: str) -> str:
        return self._made_image("c")

    @override
    async def strip_identity(self, image_id: str, base_id: str, reference: str) -> str:
        return self._made_image("d")

    @override
    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        return self._made_image("e")

    @override
    async def remove_image(self, reference: str) -> None:
        return

    @override
    async def events(self, since_nanos: int) -> AsyncIterator[EngineEvent]:
        return
        yield

    @override
    async def exec(self, engine_id: str, request: ExecRequest) -> ExecSession:
        await self._call("exec")
        if self._there(engine_id, "exec").state is not EngineState.RUNNING:
            raise self._rejected("exec", "container is not running")
        session = FakeSession(request)
        self.sessions.put_nowait(session)
        return session


class FakeInventory(GpuInventory):
    """Eight cards, all well."""

    @override
    async def snapshot(self) -> GpuReport:
        cards = tuple(
            Gpu(uuid=f"GPU-{n}", index=n, minor_number=n, name="NVIDIA A100", memory_total_bytes=80 << 30)
            for n in range(8)
        )
        return GpuReport(gpus=cards, driver_version="550.1", nvml_version="12.550", cuda_driver_version="12.4")


class FakeLayers(LayerStore):
    """Exchanges what it never sees."""

    image_accounts: ImageAccounts | None = None

    @override
    async def methods(self) -> tuple[tuple[LayerTransferMethod, str], ...]:
        return (
            (LayerTransferMethod.EXCHANGE, ""),
            (LayerTransferMethod.COPY, ""),
            (LayerTransferMethod.COMMIT, "not today"),
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


class FakeLedger(RevisionBackupStore):
    """Remembers entries, and nothing beside them."""

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
    """A snapshot that is final, and the operation that made it."""

    files: Files
    snapshot: Snapshot
    operation_id: str


class FakeSnapshots(SnapshotStore):
    """Snapshots of layers without files: those that are sealed, and partial ones with whether they are complete."""

    def __init__(self) -> None:
        self.sealed_snapshots: dict[SnapshotKey, SealedSnapshot] = {}
        self.partial: dict[tuple[SnapshotKey, str], Files] = {}
        self.completed: set[tuple[SnapshotKey, str]] = set()

    def files_of(self, container: EngineContainer) -> Files:  # noqa: ARG002 - others have files
        """What a container has in its layer."""
        return frozenset()

    def fill(self, container: EngineContainer, files: Files) -> None:
        """Make a container's layer equal to `files`."""

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
        made = Snapshot(
            kind=SnapshotKind.TREE,
            image_id=image_id,
            method=SnapshotMethod.LINK,
            layer_bytes=9,
            entries=len(files),
            create_time=LONG_AGO,
        )
        self.sealed_snapshots[key] = SealedSnapshot(files, made, operation_id)
        return made

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
        self.sealed_snapshots = {key: one for key, one in self.sealed_snapshots.items() if key.uid != uid}
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


@dataclass
class FakeProcesses(ProcessControl):
    """Notes signals; every process dies of the first that ends one.

    `unbegun` is how often a process is seen before it executes its program; a signal that comes earlier is lost.
    """

    signals: list[tuple[int, bool]] = field(default_factory=list)
    living: bool = True
    unbegun: int = 0

    @override
    def alive(self, pid: int, engine_id: str) -> bool:
        return self.living

    @override
    def has_begun(self, pid: int, engine_id: str) -> bool:
        if self.unbegun:
            self.unbegun -= 1
            return False
        return True

    @override
    def signal(self, pid: int, engine_id: str, signal_number: int, *, session: bool = False) -> bool:
        if self.unbegun:
            return True
        self.signals.append((signal_number, session))
        self.living = False
        return True


async def every_port_is_free(protocol: str, port: int) -> bool:  # noqa: ARG001 - a PortProbe's
    """A PortProbe."""
    return True


LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)
