"""A store, an engine and cards in memory, for what a real one does not do on demand: hang, fail, be slow.

They keep the promises of `ports` that the RPCs lean on and no more.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from gpudock_server.errors import FieldViolation, GpudockError, InvalidArgument
from gpudock_server.model import changes as change
from gpudock_server.model.claims import ClaimKey, ClaimTable, Holder
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.engine import (
    Blueprint,
    EngineContainer,
    EngineEvent,
    EngineImage,
    EngineInfo,
    EngineState,
    ExecRequest,
    ExecStatus,
    ExecStream,
    RegistryAuth,
)
from gpudock_server.model.gpu import Gpu, GpuSnapshot
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import CarryMethod, Operation, RequestRecord
from gpudock_server.ports import (
    CarryPlan,
    ContainerView,
    Engine,
    ExecSession,
    GpuInventory,
    LayerPair,
    LayerStore,
    Page,
    ProcessControl,
    Progress,
    Store,
    StoreConflict,
    T,
    Versioned,
)
from typing_extensions import override

IMAGE = "busybox:latest"


class MemoryStore(Store):
    """A store whose transactions are plain Python. Pages show the moment of the first."""

    def __init__(self) -> None:
        self.version = 0
        self.heads: dict[str, Versioned[Container]] = {}
        self.locks: dict[str, str] = {}
        self.held: dict[ClaimKey, Holder] = {}
        self.journal: dict[str, Versioned[Operation]] = {}
        self.calls: dict[str, RequestRecord] = {}
        self.reads = 0
        self._moments: list[Sequence[object]] = []

    @override
    async def apply(self, changes: Sequence[change.Change]) -> int:
        for item in changes:
            self._check(item)
        self.version += 1
        for item in changes:
            self._do(item)
        return self.version

    def _check(self, item: change.Change) -> None:
        found: object = None
        match item:
            case change.LockContainer(name=name):
                found, holds = self.locks.get(name), name not in self.locks
            case change.UnlockContainer(name=name, operation_id=operation_id):
                found = self.locks.get(name)
                holds = found == operation_id
            case change.Claim(key=key):
                found, holds = self.held.get(key), key not in self.held
            case change.Keep(key=key, holder=holder):
                found = self.held.get(key)
                holds = isinstance(found, Holder) and found.uid == holder.uid
            case change.PutContainer(container=container, expect=expect):
                found = self.heads.get(container.name)
                holds = (found.version if isinstance(found, Versioned) else 0) == expect
            case change.PutOperation(operation=operation, expect=expect):
                found = self.journal.get(operation.id)
                holds = (found.version if isinstance(found, Versioned) else 0) == expect
            case change.PutRequest(request_id=request_id, ended=ended):
                found = self.calls.get(request_id)
                holds = ended or found is None
            case _:
                holds = True
        if not holds:
            raise StoreConflict(item, found)

    def _do(self, item: change.Change) -> None:
        match item:
            case change.LockContainer(name=name, operation_id=operation_id):
                self.locks[name] = operation_id
            case change.UnlockContainer(name=name):
                del self.locks[name]
            case change.Claim(key=key, holder=holder) | change.Keep(key=key, holder=holder):
                self.held[key] = holder
            case change.Release(key=key, uid=uid):
                if (holder := self.held.get(key)) is not None and holder.uid == uid:
                    del self.held[key]
            case change.PutContainer(container=container):
                self.heads[container.name] = Versioned(container, self.version)
            case change.DeleteContainer(name=name):
                self.heads.pop(name, None)
            case change.PutOperation(operation=operation):
                self.journal[operation.id] = Versioned(operation, self.version)
            case change.PutRequest(request_id=request_id, record=record):
                self.calls[request_id] = record
            case change.PutRevision():
                pass

    def put(self, container: Container) -> None:
        """A container that was made earlier."""
        self.version += 1
        self.heads[container.name] = Versioned(container, self.version)

    @override
    async def container(self, name: str) -> ContainerView | None:
        head = self.heads.get(name)
        return ContainerView(head.value, head.version, self.locks.get(name, "")) if head else None

    @override
    async def containers(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        views = [
            ContainerView(head.value, head.version, self.locks.get(name, ""))
            for name, head in sorted(self.heads.items())
        ]
        return self._page(views, page_size, page_token)

    def _page(self, items: Sequence[T], size: int, token: str) -> Page[T]:
        self.reads += 1
        moment, first = 0, 0
        if token:
            try:
                moment, first = (int(part) for part in token.split("-"))
            except ValueError:
                raise InvalidArgument((FieldViolation("page_token", "is none of mine"),)) from None
            items = self._moments[moment]  # type: ignore[assignment]  # what was listed then
        else:
            moment = len(self._moments)
            self._moments.append(items)
        last = first + size
        return Page(tuple(items[first:last]), f"{moment}-{last}" if last < len(items) else "")

    @override
    async def revisions(self, uid: str) -> tuple[ContainerRevision, ...]:
        return ()

    @override
    async def claims(self, host: str) -> ClaimTable:
        return ClaimTable(dict(self.held))

    @override
    async def operation(self, operation_id: str) -> Versioned[Operation] | None:
        return self.journal.get(operation_id)

    @override
    async def operations(self, *, page_size: int, page_token: str) -> Page[Operation]:
        newest = sorted((stored.value for stored in self.journal.values()), key=lambda op: op.create_time, reverse=True)
        return self._page(newest, page_size, page_token)

    @override
    async def unfinished(self, node: str) -> tuple[Versioned[Operation], ...]:
        return ()

    @override
    async def request(self, request_id: str) -> RequestRecord | None:
        return self.calls.get(request_id)

    @override
    async def nodes(self) -> tuple[NodeRecord, ...]:
        return ()

    @override
    async def ping(self) -> str:
        return "3.5.0"


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
    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        for current, total in self.pull_progress:
            progress(current, total)
            await asyncio.sleep(0)
        await self._call("pull")
        self.has_image = True

    @override
    async def has_volume(self, name: str) -> bool:
        return False

    @override
    async def remove_volume(self, name: str) -> None:
        return

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
    async def update(self, engine_id: str, *, cpus: float, memory_bytes: int) -> None:
        await self._call("update")

    @override
    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        return None

    @override
    async def remove(self, engine_id: str) -> None:
        await self._call("remove")
        self.containers.pop(engine_id, None)

    @override
    async def commit(self, engine_id: str, reference: str, labels: Mapping[str, str]) -> str:
        return "sha256:" + "b" * 64

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

    @override
    async def methods(self) -> tuple[tuple[CarryMethod, str], ...]:
        return ((CarryMethod.EXCHANGE, ""), (CarryMethod.COPY, ""), (CarryMethod.COMMIT, "not today"))

    @override
    async def plan(self, old: EngineContainer) -> CarryPlan:
        return CarryPlan(method=CarryMethod.EXCHANGE)

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


@dataclass
class FakeProcesses(ProcessControl):
    """Notes signals; every process dies of the first that ends one."""

    signals: list[tuple[int, bool]] = field(default_factory=list)
    living: bool = True

    @override
    def alive(self, pid: int, engine_id: str) -> bool:
        return self.living

    @override
    def signal(self, pid: int, engine_id: str, signal_number: int, *, session: bool = False) -> bool:
        self.signals.append((signal_number, session))
        self.living = False
        return True


async def every_port_is_free(protocol: str, port: int) -> bool:
    """A PortProbe."""
    return True


LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)
