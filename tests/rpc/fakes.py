"""An engine, GPUs and processes in memory, which can block, fail or be slow on demand.

They implement those parts of `ports` that the tests of RPCs need.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from gpudock_server.errors import EngineRejected, GpudockError, ImageNotFound, VolumeExists
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
    RegistryAuth,
    TerminalSize,
)
from gpudock_server.model.gpu import Gpu, GpuReport
from gpudock_server.model.spec import RestartPolicy
from gpudock_server.ports import Engine, ExecSession, GpuInventory, ProcessControl, Progress
from typing_extensions import override

IMAGE = "busybox:latest"
_IMAGE_ID = "sha256:" + "a" * 64


class FakeSession(ExecSession):
    """A process whose output a test puts into `output` (None: its end), and that records its input."""

    def __init__(self, request: ExecRequest) -> None:
        self.request = request
        self.output: asyncio.Queue[tuple[ExecStream, bytes] | None] = asyncio.Queue()
        self.exit_code: int | None = None
        self.written: list[bytes] = []
        self.sizes: list[TerminalSize] = []
        self.stdin_closed = asyncio.Event()
        self.closed = asyncio.Event()
        self.chunks_read = 0
        self.accepts_stdin = asyncio.Event()
        self.accepts_stdin.set()

    def write_output(self, data: bytes, stream: ExecStream = ExecStream.STDOUT) -> None:
        """Write to stdout or stderr."""
        self.output.put_nowait((stream, data))

    def exit(self, exit_code: int | None) -> None:
        """Exit."""
        self.exit_code = exit_code
        self.output.put_nowait(None)

    @override
    async def read(self) -> AsyncIterator[tuple[ExecStream, bytes]]:
        while (chunk := await self.output.get()) is not None:
            self.chunks_read += 1
            yield chunk

    @override
    async def write(self, data: bytes) -> None:
        await self.accepts_stdin.wait()
        self.written.append(data)

    @override
    async def close_stdin(self) -> None:
        self.stdin_closed.set()

    @override
    async def resize(self, size: TerminalSize) -> None:
        self.sizes.append(size)

    @override
    async def status(self) -> ExecStatus:
        return ExecStatus(running=self.exit_code is None, exit_code=self.exit_code, pid=4711)

    @override
    async def close(self) -> None:
        self.closed.set()


@dataclass
class FakeEngine(Engine):
    """An engine whose methods a test can block (`gates`) or fail (`failures`), by name.

    It keeps the states of containers. NOT_FAKED in tests/contracts/test_engine*.py lists what it does not implement.
    """

    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    failures: dict[str, GpudockError] = field(default_factory=dict)
    containers: dict[str, EngineContainer] = field(default_factory=dict)
    volumes: dict[str, EngineVolume] = field(default_factory=dict)
    sessions: asyncio.Queue[FakeSession] = field(default_factory=asyncio.Queue)
    pull_progress: list[tuple[int, int]] = field(default_factory=list)
    has_image: bool = True
    added_images: set[str] = field(default_factory=set)

    def _rejected(self, call: str, detail: str, status: int = 409) -> EngineRejected:
        return EngineRejected(call=call, status=status, detail=detail)

    def _require(self, engine_id: str, call: str) -> EngineContainer:
        if engine_id not in self.containers:
            raise self._rejected(call, f"no such container: {engine_id}", 404)
        return self.containers[engine_id]

    def _find_by_name(self, name: str, operation: str | None, call: str) -> str | None:
        """Return the id of the container with this name if the same operation created it; None if there is none.

        Raises EngineRejected if another operation created it.
        """
        for container in self.containers.values():
            if container.name == name:
                if operation is None or container.labels.get(LABEL_OPERATION) != operation:
                    raise self._rejected(call, f"the name {name} is in use")
                return container.id
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
        return tuple(volume for volume in self.volumes.values() if labels.items() <= volume.labels.items())

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
        if found := self._find_by_name(engine_spec.name, operation, "create a container"):
            return found
        if engine_spec.image_id not in (_IMAGE_ID, *self.added_images):
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
        return next(
            (container for container in self.containers.values() if engine_id in (container.id, container.name)), None
        )

    @override
    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        return tuple(
            container
            for container in self.containers.values()
            if all(key in container.labels and value in ("", container.labels[key]) for key, value in labels.items())
        )

    @override
    async def start(self, engine_id: str) -> None:
        await self._call("start")
        if self._require(engine_id, "start").state is EngineState.PAUSED:
            raise self._rejected("start", "cannot start a paused container, try unpause instead")
        self._set(engine_id, EngineState.RUNNING)

    @override
    async def stop(self, engine_id: str, timeout: float) -> None:
        await self._call("stop")
        if engine_id in self.containers and self.containers[engine_id].alive:
            self._set(engine_id, EngineState.EXITED)

    @override
    async def pause(self, engine_id: str) -> None:
        if not self._require(engine_id, "pause").alive:
            raise self._rejected("pause", "container is not running")
        self._set(engine_id, EngineState.PAUSED)

    @override
    async def unpause(self, engine_id: str) -> None:
        if not self._require(engine_id, "unpause").alive:
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
        self._require(engine_id, "update")

    @override
    async def rename(self, engine_id: str, name: str) -> None:
        await self._call("rename")
        container = self._require(engine_id, "rename")
        if any(other.name == name and other.id != engine_id for other in self.containers.values()):
            raise self._rejected("rename", f"the name {name} is in use")
        self.containers[engine_id] = replace(container, name=name)

    @override
    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        container = self._require(engine_id, "wait")
        return None if container.alive else container.exit_code

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
        self._require(engine_id, "commit")
        return self._add_image("b")

    def _add_image(self, digit: str) -> str:
        self.added_images.add("sha256:" + digit * 64)
        return "sha256:" + digit * 64

    @override
    async def create_file_holder(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        return "holder"

    @override
    async def tag(self, image: str, reference: str) -> None:
        await self._call("tag")

    @override
    async def replace_config(self, image_id: str, other_id: str, reference: str) -> str:
        return self._add_image("c")

    @override
    async def strip_identity(self, image_id: str, base_id: str, reference: str) -> str:
        return self._add_image("d")

    @override
    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        return self._add_image("e")

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
        if self._require(engine_id, "exec").state is not EngineState.RUNNING:
            raise self._rejected("exec", "container is not running")
        session = FakeSession(request)
        self.sessions.put_nowait(session)
        return session


class FakeInventory(GpuInventory):
    """Eight healthy GPUs."""

    @override
    async def snapshot(self) -> GpuReport:
        gpus = tuple(
            Gpu(uuid=f"GPU-{n}", index=n, minor_number=n, name="NVIDIA A100", memory_total_bytes=80 << 30)
            for n in range(8)
        )
        return GpuReport(gpus=gpus, driver_version="550.1", nvml_version="12.550", cuda_driver_version="12.4")


@dataclass
class FakeProcesses(ProcessControl):
    """Records signals; the first one ends the process.

    A process has begun its program after `checks_until_begun` checks; earlier signals are lost.
    """

    signals: list[tuple[int, bool]] = field(default_factory=list)
    is_alive: bool = True
    checks_until_begun: int = 0

    @override
    def alive(self, pid: int, engine_id: str) -> bool:
        return self.is_alive

    @override
    def has_begun(self, pid: int, engine_id: str) -> bool:
        if self.checks_until_begun:
            self.checks_until_begun -= 1
            return False
        return True

    @override
    def signal(self, pid: int, engine_id: str, signal_number: int, *, session: bool = False) -> bool:
        if self.checks_until_begun:
            return True
        self.signals.append((signal_number, session))
        self.is_alive = False
        return True


async def every_port_is_free(protocol: str, port: int) -> bool:  # noqa: ARG001 - the parameters of a PortProbe
    """Return True, as a PortProbe."""
    return True


LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)
