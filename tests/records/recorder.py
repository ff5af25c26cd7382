"""Makes a recording of this version: `python -m tests.records.recorder FOLDER`, as root.

It starts the daemon of this checkout on a rig, and makes it write every kind of record. Then it begins operations of
every kind, holds each at an engine call, and kills the daemon during a scale, when the old engine container has stopped
and its files are not transferred yet. The keys in etcd are the recording (see `recording`).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from gpudock.v1 import container_pb2, container_service_pb2, operation_service_pb2, port_pb2, volume_service_pb2

from tests.calls import Caller, progress_of, result_of, scale_request
from tests.conftest import FAST_FLAGS
from tests.engine.isolated_daemons import until, until_state
from tests.engine.loop_devices import detach_loop_devices
from tests.faults.instrumented_daemon import DIE_AT, KIND
from tests.records.answers import answers_of
from tests.records.recording import Recording, Stored, dump, load
from tests.rig import BUSYBOX, CUDA_LIKE, Daemon, EngineProxy, Rig
from tests.rig.patience import limit

NODE, HOST = "recorded", "recorded-host"
PREFIX = "/gpudock/v1/"
# The content of the file of the container whose scale is interrupted.
KEPT = "kept"
_ONE_NODE = ("--node-name", NODE, "--host-id", HOST, "--engine-timeout", "600", "--watch-checkpoint-interval", "1")
_MIB = 1 << 20
SIZE = 320 * _MIB
_HIT_SECONDS = 60.0
_ENDS = ("sh", "-c", "exit 3")
_MANY = "mkdir /many; i=0; while [ $i -lt 1000 ]; do : > /many/$i; i=$((i+1)); done"
_NEVER = container_pb2.SNAPSHOT_POLICY_NEVER
HALF_SCALED, HALF_CREATED, HALF_RESIZED, USER = "half-scaled", "half-created", "half-resized", "uses-half-resized"


def main() -> int:
    """Make the recording; returns the exit code."""
    folder = Path(sys.argv[1])
    if folder.exists():
        sys.stderr.write(f"{folder} exists: a recording is never changed\n")
        return 1
    with Rig(images=(BUSYBOX, CUDA_LIKE)) as rig:
        asyncio.run(_Recorder(rig).record()).write(folder)
    return 0


class _Recorder:
    """One installation, from its first record until its daemon is killed."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._host_path = rig.folder / "host-path"
        self._daemon: Daemon | None = None

    async def record(self) -> Recording:
        self._host_path.mkdir()
        async with self._rig.engine_proxy() as proxy:
            try:
                async with self._running() as caller:
                    await self._containers(caller)
                    await self._histories(caller)
                    await self._watched(caller)
                    await self._volumes(caller)
                async with self._running("--layer-carry", "commit") as caller:
                    await self._images(caller)
                    await self._without_host_paths()
                async with self._running(engine=proxy) as caller:
                    await self._failures(caller, proxy)
                    await self._interrupted(caller, proxy)
                keys = _without_similar_operations(dump(self._rig.etcd, PREFIX))
                return Recording(keys, await self._answers(keys), self._engine(), dict(self._files(keys)))
            finally:
                detach_loop_devices(self._rig.folder)

    @asynccontextmanager
    async def _running(self, *flags: str, engine: EngineProxy | None = None) -> AsyncIterator[Caller]:
        """The next daemon. With an engine proxy it is killed during its first scale."""
        before, killed = self._daemon, engine is not None
        environment = {KIND: "SCALE", DIE_AT: "before LayerStore.exchange"} if killed else {}
        self._daemon = await self._rig.start_daemon(
            *FAST_FLAGS,
            *_ONE_NODE,
            *("--allowed-host-paths", str(self._host_path), "--volume-filesystem", "xfs"),
            *("--snapshot-max-entries", "1000"),
            *flags,
            module="tests.faults.instrumented_daemon" if killed else "gpudock_server",
            environment=environment,
            state_dir=before.state_dir if before else None,
            socket=before.socket if before else None,
            docker_host=engine.url if engine else None,
        )
        async with Caller(self._daemon.target) as caller:
            yield caller
        if not killed:
            await asyncio.to_thread(self._daemon.stop)
        assert "Traceback" not in self._daemon.log_text, self._daemon.log_text

    # -- ended operations --------------------------------------------------------------------------------------------

    async def _containers(self, caller: Caller) -> None:
        """Make a container in each state, and one with every field of a spec."""
        await caller.create_volume("data", SIZE, owner="alice", labels={"team": "blue"})
        await _created(caller, "full", _full_spec(), owner="alice", request_id=_request_id(1))
        await caller.create("none")
        await caller.create("paused", 1)
        await caller.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name="paused"))
        await caller.create("stopped", 1)
        await caller.stop("stopped")
        await caller.create("stopped-with-its-gpu", 1)
        await caller.stop("stopped-with-its-gpu", keep_resources=True)
        await caller.create("exited", command=_ENDS)
        always = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
        await caller.create("restarting", command=_ENDS, restart_policy=always)
        mounts = [container_pb2.Mount(host_path=str(self._host_path), target="/host", read_only=True)]
        failed = await caller.create("failed", image=CUDA_LIKE, mounts=mounts)
        self._rig.engine.call("DELETE", f"/containers/{failed.status.engine_id}", query={"force": "1"})
        for name, state in (
            ("exited", container_pb2.CONTAINER_STATE_EXITED),
            ("restarting", container_pb2.CONTAINER_STATE_RESTARTING),
            ("failed", container_pb2.CONTAINER_STATE_FAILED),
        ):
            await until_state(caller, name, state)

    async def _histories(self, caller: Caller) -> None:
        """Make revisions of every cause, with and without their files."""
        await caller.create("history", 1)
        await caller.shell("history", "echo first > /file")
        await caller.scale("history", 2, memory_bytes=128 * _MIB)
        await caller.update("history", env={"a": "b"}, labels={"c": "d"})
        await caller.rollback("history", 1)
        await caller.restart("history")
        await caller.stop("history")
        await caller.start("history", 0)
        await caller.clone("history", "cloned", "env", env={"e": "f"})
        await caller.commit("history", "recorded/image", tag="one")
        await caller.create("large")
        await caller.shell("large", _MANY)
        await caller.update("large", hostname="second")

    async def _failures(self, caller: Caller, proxy: EngineProxy) -> None:
        """Make operations that fail, and one that is cancelled."""
        with suppress(grpc.aio.AioRpcError):
            await caller.create("never", command=("/not-there",))
        held = proxy.faults.hang("POST", "/containers/create")
        creating = asyncio.create_task(_log_failure(caller.create("cancelled")))
        await asyncio.wait_for(held.hit.wait(), limit(_HIT_SECONDS))
        listed = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest(page_size=1))
        cancel = operation_service_pb2.CancelOperationRequest(id=listed.operations[0].id)
        await caller.operations.CancelOperation(cancel)
        proxy.faults.clear()
        await creating
        await caller.until_idle()

    async def _volumes(self, caller: Caller) -> None:
        """Make volumes of every kind that the host supports, with revisions of every cause."""
        await caller.create_volume("plain", labels={"a": "b"}, request_id=_request_id(2))
        await caller.resize_volume("data", SIZE + 8 * _MIB)
        for name in ("theirs", "theirs-too"):
            self._rig.engine.call("POST", "/volumes/create", send={"Name": name, "Labels": {"gpudock.adopt": "true"}})
        await caller.adopt_volume("adopted", "theirs")
        await caller.create_volume("shrunk", SIZE + 64 * _MIB)
        await caller.resize_volume("shrunk", SIZE)
        await caller.create_volume("deleted", SIZE)
        await caller.delete_volume("deleted")
        await caller.create("deleted")
        await caller.delete("deleted")

    async def _watched(self, caller: Caller) -> None:
        """Keep watches idle for so long that the daemon writes their idle keys."""
        streams = (
            caller.containers.WatchContainers(container_service_pb2.WatchContainersRequest()),
            caller.volumes.WatchVolumes(volume_service_pb2.WatchVolumesRequest()),
        )

        async def idle() -> bool:
            keys = dump(self._rig.etcd, PREFIX)
            return {"idle/containers", "idle/volumes"} <= keys.keys()

        reading = [asyncio.create_task(_read(stream)) for stream in streams]
        await until(idle)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    async def _images(self, caller: Caller) -> None:
        """Make a container whose files are transferred by a commit to an image."""
        await caller.create("carried", 1)
        await caller.shell("carried", "echo first > /file")
        await caller.scale("carried", 0)

    async def _without_host_paths(self) -> None:
        """Wait until no host path is bound: a daemon with a proxy would bind it in the namespaces of the proxy."""
        assert self._daemon is not None
        records = self._daemon.state_dir / "host-paths"

        async def none() -> bool:
            return not list(records.glob("*.json"))

        await until(none)

    # -- interrupted operations --------------------------------------------------------------------------------------

    async def _interrupted(self, caller: Caller, proxy: EngineProxy) -> None:
        """Begin operations of every kind, each held at an engine call; then the scale that kills the daemon."""
        await self._prepared(caller)
        held: list[asyncio.Task[None]] = []
        for method, path, call in await self._held_calls(caller):
            fault = proxy.faults.hang(method, path)
            held.append(asyncio.create_task(_log_failure(call())))
            hit = asyncio.create_task(fault.hit.wait())
            await asyncio.wait((hit, held[-1]), timeout=_HIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            assert hit.done(), f"no {method} {path} reached the engine: {held[-1]}"
        await _log_failure(
            progress_of(caller.containers.ScaleContainer(scale_request(HALF_SCALED, 1, snapshots=_NEVER)))
        )
        assert self._daemon is not None
        assert await asyncio.to_thread(self._daemon.wait) == -9, self._daemon.log_text
        await asyncio.gather(*held)

    async def _prepared(self, caller: Caller) -> None:
        await caller.create(HALF_SCALED)
        await caller.shell(HALF_SCALED, f"echo {KEPT} > /file")
        for name in ("half-stopped", "half-paused", "half-deleted", "half-updated", "half-committed"):
            await caller.create(name)
        await caller.create_volume(HALF_RESIZED, SIZE + 64 * _MIB)
        await caller.create(USER, mounts=[container_pb2.Mount(volume=HALF_RESIZED, target="/data")])
        await caller.create_volume("half-deleted", SIZE)

    async def _held_calls(self, caller: Caller) -> list[tuple[str, str, Callable[[], Awaitable[object]]]]:
        """The engine requests to hold, each with the call that causes it."""
        ids = {
            name: (await caller.get(name)).status.engine_id
            for name in ("half-stopped", "half-paused", "half-deleted", USER)
        }
        volume = next(
            volume for volume in self._rig.engine.call("GET", "/volumes")["Volumes"] if _is_of(volume, "half-deleted")
        )
        pause = container_service_pb2.PauseContainerRequest(name="half-paused")
        start = "/containers/[0-9a-f]+/start"
        return [
            ("POST", start, lambda: caller.create(HALF_CREATED)),
            ("POST", f"/containers/{ids['half-stopped']}/stop", lambda: caller.stop("half-stopped")),
            ("POST", f"/containers/{ids['half-paused']}/pause", lambda: caller.containers.PauseContainer(pause)),
            ("DELETE", f"/containers/{ids['half-deleted']}", lambda: caller.delete("half-deleted")),
            ("POST", "/containers/create", lambda: caller.clone("none", "half-cloned")),
            ("DELETE", "/containers/[0-9a-f]+", lambda: caller.create("half-undone", command=("/not-there",))),
            ("POST", "/commit", lambda: caller.commit("half-committed", "recorded/half")),
            ("POST", start, lambda: caller.update("half-updated", env={"a": "b"})),
            ("DELETE", "/images/.*", lambda: caller.delete_revision("carried", 1)),
            ("POST", "/volumes/create", lambda: caller.create_volume("half-made", SIZE)),
            ("POST", "/volumes/create", lambda: caller.adopt_volume("half-adopted", "theirs-too", SIZE)),
            (
                "POST",
                f"/containers/{ids[USER]}/stop",
                lambda: caller.resize_volume(HALF_RESIZED, SIZE),
            ),
            ("DELETE", f"/volumes/{volume['Name']}", lambda: caller.delete_volume("half-deleted")),
        ]

    # -- the parts of the recording ----------------------------------------------------------------------------------

    async def _answers(self, keys: Mapping[str, Stored]) -> Mapping[str, Any]:
        """The answers of a daemon of another node, which drives no operation."""
        load(self._rig.etcd, "/read/", keys)
        reader = await self._rig.start_daemon(
            *FAST_FLAGS, *("--node-name", "reader", "--host-id", HOST, "--etcd-prefix", "/read/")
        )
        async with Caller(reader.target) as caller:
            answers = await answers_of(caller)
        await asyncio.to_thread(reader.stop)
        return answers

    def _engine(self) -> dict[str, Any]:
        """The paths of folders, and the engine containers and volumes of the interrupted scale, create and resize."""
        assert self._daemon is not None
        engine = self._rig.engine
        listed = engine.call("GET", "/containers/json", query={"all": "1"})
        containers = [engine.call("GET", f"/containers/{item['Id']}/json") for item in listed]
        parts = ("Id", "Image", "Config", "HostConfig", "GraphDriver")
        return {
            "data_root": str(engine.data_root),
            "state_dir": str(self._daemon.state_dir),
            "containers": {
                inspected["Name"].removeprefix("/"): {part: inspected[part] for part in parts}
                for inspected in containers
                if inspected["Config"]["Labels"].get("gpudock.name") in (HALF_SCALED, HALF_CREATED, USER)
            },
            "volumes": {
                volume["Name"]: {part: volume[part] for part in ("Driver", "Options", "Labels")}
                for volume in engine.call("GET", "/volumes")["Volumes"]
                if _is_of(volume, HALF_RESIZED)
            },
        }

    def _files(self, keys: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
        """The files of one container and of two volumes, one of them with the backing that it is copied to."""
        assert self._daemon is not None
        heads = ("containers/history", "volumes/data", f"volumes/{HALF_RESIZED}")
        uids = {json.loads(keys[key].value)["record"]["uid"] for key in heads}
        arguments = [
            json.loads(stored.value)["record"]["arguments"] for key, stored in keys.items() if key.startswith("arg")
        ]
        uids |= {record["copy_uid"] for record in arguments if "copy_uid" in record}
        for root in (self._daemon.state_dir / "volumes", self._rig.engine.data_root / "gpudock/snapshots" / NODE):
            for path in sorted(root.rglob("*.json")):
                name = path.relative_to(root)
                if name.parts[0] in uids and "diff" not in name.parts:
                    yield f"{root.name}/{name}", path.read_text()


def _without_similar_operations(keys: Mapping[str, Stored]) -> dict[str, Stored]:
    """The keys without ended operations that equal another in kind, state, and having a result and a request id."""
    sorts: set[object] = set()
    left_out: set[str] = set()
    with_results = {key.split("/")[1] for key in keys if key.startswith("results/")}
    for key, stored in keys.items():
        if key.startswith("operations/"):
            record = json.loads(stored.value)["record"]
            sort = (record["kind"], record["state"], record["id"] in with_results, bool(record["request_id"]))
            if record["end_time"] and sort in sorts:
                left_out.add(record["id"])
            sorts.add(sort)
    return {
        key: stored
        for key, stored in keys.items()
        if not (key.startswith(("operations/", "results/")) and key.split("/")[1] in left_out)
    }


def _full_spec() -> container_pb2.ContainerSpec:
    pb = container_pb2
    return Caller.spec(
        2,
        entrypoint=["sh"],
        command=["-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"],
        env={"GREETING": "grüße\n", "EMPTY": ""},
        working_dir="/tmp",
        user="user",
        hostname="full",
        tty=True,
        stdin=True,
        labels={"team": "blue"},
        cpus=1.5,
        memory_bytes=256 * _MIB,
        shm_size_bytes=128 * _MIB,
        pids_limit=100,
        mounts=[
            pb.Mount(volume="data", target="/data"),
            pb.Mount(tmpfs=pb.TmpfsMount(size_bytes=_MIB, mode=0o700), target="/scratch"),
        ],
        ports=[
            pb.PortRequest(container_port=80),
            pb.PortRequest(container_port=53, protocol=port_pb2.PORT_PROTOCOL_UDP, host_port=20500),
        ],
        restart_policy=pb.RestartPolicy(policy=pb.RESTART_POLICY_KIND_ON_FAILURE, max_retry_count=3),
        stop_signal="SIGTERM",
        stop_timeout=Duration(seconds=2),
        health_check=pb.HealthCheck(
            command=["true"],
            interval=Duration(seconds=1),
            timeout=Duration(seconds=5),
            start_period=Duration(seconds=1),
            retries=2,
        ),
        revision_policy=pb.RevisionPolicy(
            snapshots=pb.SNAPSHOT_POLICY_CHEAP, keep_revisions=5, keep_for=Duration(seconds=86400)
        ),
    )


async def _created(caller: Caller, name: str, spec: container_pb2.ContainerSpec, **fields: Any) -> None:
    request = container_service_pb2.CreateContainerRequest(name=name, spec=spec, **fields)
    await result_of(caller.containers.CreateContainer(request))


def _request_id(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def _is_of(volume: Mapping[str, Any], name: str) -> bool:
    return name in str(volume["Labels"])


async def _log_failure(call: Any) -> None:
    """Await a call; print the error with which an interrupted or cancelled call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        sys.stderr.write(f"{error.code().name}: {error.details()}\n")


async def _read(stream: Any) -> None:
    async for _ in stream:
        pass


if __name__ == "__main__":
    sys.exit(main())
