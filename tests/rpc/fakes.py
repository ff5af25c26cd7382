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

from gpudock_server.errors import GpudockError, SnapshotFailed
from gpudock_server.model.engine import (
    Blueprint,
    EngineContainer,
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
from gpudock_server.model.gpu import Gpu, GpuSnapshot
from gpudock_server.model.ledger import LedgerEntry
from gpudock_server.model.operation import CarryMethod
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind, SnapshotMethod
from gpudock_server.model.spec import RestartPolicy
from gpudock_server.ports import (
    CarryPlan,
    CommitCost,
    Engine,
    ExecSession,
    GpuInventory,
    LayerPair,
    LayerStore,
    Ledger,
    ProcessControl,
    Progress,
    SnapshotPlan,
    SnapshotStore,
)
from typing_extensions import override

IMAGE = "busybox:latest"


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
    """An engine whose calls a test can hold (`gates`) or fail (`failures`), by the method's name."""

    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    failures: dict[str, GpudockError] = field(default_factory=dict)
    containers: dict[str, EngineContainer] = field(default_factory=dict)
    volumes: dict[str, EngineVolume] = field(default_factory=dict)
    sessions: asyncio.Queue[FakeSession] = field(default_factory=asyncio.Queue)
    pull_progress: list[tuple[int, int]] = field(default_factory=list)
    has_image: bool = True

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
        return EngineImage(id="sha256:" + "a" * 64) if reference == IMAGE and self.has_image else None

    @override
    async def image_ids(self) -> tuple[str, ...]:
        return ()

    @override
    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        for current, total in self.pull_progress:
            progress(current, total)
            await asyncio.sleep(0)
        await self._call("pull")
        self.has_image = True

    @override
    async def image_names(self) -> tuple[str, ...]:
        return (IMAGE,)

    @override
    async def volume_names(self) -> tuple[str, ...]:
        return ()

    @override
    async def has_volume(self, name: str) -> bool:
        return False

    @override
    async def mounting(self, volume: str) -> tuple[EngineContainer, ...]:
        return ()

    @override
    async def create_volume(
        self, name: str, *, labels: Mapping[str, str], driver_options: Mapping[str, str]
    ) -> EngineVolume:
        self.volumes[name] = EngineVolume(name=name, driver="local", labels=dict(labels), options=dict(driver_options))
        return self.volumes[name]

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
    async def create(self, blueprint: Blueprint) -> str:
        await self._call("create")
        engine_id = uuid.uuid4().hex
        self.containers[engine_id] = EngineContainer(
            id=engine_id,
            name=blueprint.name,
            image_id=blueprint.image_id,
            state=EngineState.CREATED,
            pid=0,
            exit_code=0,
            oom_killed=False,
            error="",
            labels=blueprint.labels,
            gpu_uuids=blueprint.placement.gpu_uuids,
        )
        return engine_id

    @override
    async def inspect(self, engine_id: str) -> EngineContainer | None:
        return next((seen for seen in self.containers.values() if engine_id in (seen.id, seen.name)), None)

    @override
    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        return tuple(self.containers.values())

    @override
    async def start(self, engine_id: str) -> None:
        await self._call("start")
        self._set(engine_id, EngineState.RUNNING)

    @override
    async def stop(self, engine_id: str, timeout: float | None) -> None:
        await self._call("stop")
        self._set(engine_id, EngineState.EXITED)

    @override
    async def pause(self, engine_id: str) -> None:
        self._set(engine_id, EngineState.PAUSED)

    @override
    async def unpause(self, engine_id: str) -> None:
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

    @override
    async def rename(self, engine_id: str, name: str) -> None:
        await self._call("rename")

    @override
    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        return None

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
        return "sha256:" + "b" * 64

    @override
    async def create_shadow(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        return "shadow"

    @override
    async def tag(self, image: str, reference: str) -> None:
        await self._call("tag")

    @override
    async def with_config_of(self, image_id: str, other_id: str, reference: str) -> str:
        return "sha256:" + "c" * 64

    @override
    async def without_identity(self, image_id: str, base_id: str, reference: str) -> str:
        return "sha256:" + "d" * 64

    @override
    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        return "sha256:" + "e" * 64

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
        session = FakeSession(request)
        self.sessions.put_nowait(session)
        return session


class FakeInventory(GpuInventory):
    """Eight cards, all well."""

    @override
    async def snapshot(self) -> GpuSnapshot:
        cards = tuple(
            Gpu(uuid=f"GPU-{n}", index=n, minor_number=n, name="NVIDIA A100", memory_total_bytes=80 << 30)
            for n in range(8)
        )
        return GpuSnapshot(gpus=cards, driver_version="550.1", nvml_version="12.550", cuda_driver_version="12.4")


class FakeLayers(LayerStore):
    """Exchanges what it never sees."""

    image_accounts: ImageAccounts | None = None

    @override
    async def methods(self) -> tuple[tuple[CarryMethod, str], ...]:
        return ((CarryMethod.EXCHANGE, ""), (CarryMethod.COPY, ""), (CarryMethod.COMMIT, "not today"))

    @override
    async def plan(self, old: EngineContainer) -> CarryPlan:
        return CarryPlan(method=CarryMethod.EXCHANGE)

    @override
    async def accounts(self, image: EngineImage, upper_dir: str = "") -> ImageAccounts | None:
        return self.image_accounts

    @override
    async def commit_plan(self, container: EngineContainer) -> CarryPlan:
        return CarryPlan(method=CarryMethod.COMMIT)

    @override
    async def commit_cost(self, container: EngineContainer) -> CommitCost:
        return CommitCost()

    @override
    async def require_committable(self, container: EngineContainer) -> None:
        return

    @override
    def commit_watched(
        self, container: EngineContainer, total: int, progress: Progress
    ) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    @override
    async def locate(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
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


class FakeLedger(Ledger):
    """Remembers entries, and nothing beside them."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], LedgerEntry] = {}

    @override
    async def write(self, entry: LedgerEntry) -> None:
        self.entries[entry.key.uid, entry.number] = entry

    @override
    async def read(self, uid: str) -> tuple[LedgerEntry, ...]:
        return tuple(entry for (owner, _), entry in sorted(self.entries.items()) if owner == uid)

    @override
    async def forget(self, key: SnapshotKey) -> None:
        self.entries.pop((key.uid, key.revision), None)

    @override
    async def forget_all(self, uid: str) -> None:
        self.entries = {key: entry for key, entry in self.entries.items() if key[0] != uid}

    @override
    async def uids(self) -> tuple[str, ...]:
        return tuple({uid for uid, _ in self.entries})


class FakeSnapshots(SnapshotStore):
    """Keeps nothing, and remembers of what."""

    def __init__(self) -> None:
        self.kept: set[SnapshotKey] = set()

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
        return

    @override
    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        return

    @override
    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        self.kept.add(key)
        return Snapshot(kind=SnapshotKind.TREE, image_id=image_id, method=SnapshotMethod.LINK, create_time=LONG_AGO)

    @override
    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        self.kept.discard(key)

    @override
    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        if key not in self.kept:
            raise SnapshotFailed(detail="it was not kept")

    @override
    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        return

    @override
    async def remove(self, key: SnapshotKey) -> None:
        self.kept.discard(key)

    @override
    async def remove_all(self, uid: str) -> None:
        self.kept = {key for key in self.kept if key.uid != uid}

    @override
    async def sealed(self, key: SnapshotKey) -> Snapshot | None:
        return None

    @override
    async def find(self) -> tuple[SnapshotKey, ...]:
        return tuple(self.kept)

    @override
    async def partials(self) -> tuple[tuple[SnapshotKey, str], ...]:
        return ()


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
    def begun(self, pid: int, engine_id: str) -> bool:
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
