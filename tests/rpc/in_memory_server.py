"""The RPC server and core with fakes of all ports, on a unix socket, and calls of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from google.rpc import error_details_pb2
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock.v1.container_service_pb2_grpc import ContainerServiceStub
from gpudock.v1.node_service_pb2_grpc import NodeServiceStub
from gpudock.v1.operation_service_pb2_grpc import OperationServiceStub
from gpudock.v1.volume_service_pb2_grpc import VolumeServiceStub
from gpudock_server.adapters.host.memory_and_disk import LocalHostUsage
from gpudock_server.adapters.host_paths import HostPathBinder
from gpudock_server.core.assembly import NodeCore, NodePolicy, Ports
from gpudock_server.core.exec.sessions import ExecSessions
from gpudock_server.core.nodes import Nodes
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.placement.allocator import Allocator
from gpudock_server.core.reconcile import DriftTracker
from gpudock_server.core.watches import Watches
from gpudock_server.model.engine import HostCapacity
from gpudock_server.rpc.server import RpcServer, Services, build_server
from gpudock_server.settings.definitions import Settings
from grpc_status import rpc_status

from tests.contract import COVERAGE
from tests.rig.patience import limit
from tests.rpc.fake_layers import FakeLayers, FakeRevisionBackups, FakeSnapshots
from tests.rpc.fake_volumes import FakeCopier, FakePlainVolumes, FakeVolumes
from tests.rpc.fakes import (
    IMAGE,
    LONG_AGO,
    FakeEngine,
    FakeInventory,
    FakeProcesses,
    every_port_is_free,
)
from tests.rpc.memory_store import MemoryStore

UUID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
# Limits waits that need no time at all, so that a test that would hang fails.
TIMEOUT_SECONDS = 5.0

NODE = "gpu1"
HOST = "host1"
PORTS = (20000, 20009)


@dataclass(frozen=True, slots=True)
class InMemoryServer:
    """A running server, its parts, and stubs that call it."""

    store: MemoryStore
    engine: FakeEngine
    processes: FakeProcesses
    operations: Operations
    execs: ExecSessions
    watches: Watches
    drift: DriftTracker
    rpc_server: RpcServer
    channel: grpc.aio.Channel
    containers: ContainerServiceStub
    volumes: VolumeServiceStub
    nodes: NodeServiceStub
    operation_service: OperationServiceStub


@asynccontextmanager
async def serve(
    folder: Path,
    volumes: FakeVolumes | None = None,
    copier: FakeCopier | None = None,
    snapshots: FakeSnapshots | None = None,
    allowed_host_paths: tuple[str, ...] = (),
) -> AsyncIterator[InMemoryServer]:
    """Serve on a socket in `folder`, with these volumes, copier and snapshots; stop everything on exit.

    Host paths can be allowed but not mounted, since the engine is on another host.
    """
    store, engine, inventory, processes = MemoryStore(), FakeEngine(), FakeInventory(), FakeProcesses()
    core = NodeCore(
        Ports(
            store=store,
            engine=engine,
            layers=FakeLayers(),
            snapshots=snapshots or FakeSnapshots(),
            revision_backups=FakeRevisionBackups(),
            host_paths=HostPathBinder(folder, allowed=allowed_host_paths, namespace=None),
            backends=[volumes or FakeVolumes(), FakePlainVolumes()],
            copier=copier or FakeCopier(),
        ),
        NodePolicy(node=NODE, host=HOST, stop_seconds=10, settle_seconds=0, pool_path="/volumes"),
        Allocator(store=store, inventory=inventory, probe=every_port_is_free, host=HOST, port_range=PORTS),
        HostCapacity(),
    )
    execs = ExecSessions(engine, core.container_resource, processes, hangup_grace=0.2, limit=4)
    nodes = Nodes(
        store=store,
        engine=engine,
        layers=core.ports.layers,
        inventory=inventory,
        host_usage=LocalHostUsage(),
        claims=core.claims,
        backends=core.backends,
        version="1",
        start_time=LONG_AGO,
        port_range=PORTS,
    )
    watches, drift = Watches(store, checkpoint_seconds=60), DriftTracker()
    services = Services(
        containers=core.containers,
        volumes=core.volumes,
        operations=core.operations,
        execs=execs,
        nodes=nodes,
        watches=watches,
        drift=drift,
    )
    server = build_server(services, Settings())
    address = f"unix:{folder / 'rpc.sock'}"
    server.grpc.add_insecure_port(address)
    await server.grpc.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield InMemoryServer(
                store=store,
                engine=engine,
                processes=processes,
                operations=core.operations,
                execs=execs,
                watches=watches,
                drift=drift,
                rpc_server=server,
                channel=channel,
                containers=ContainerServiceStub(channel),
                volumes=VolumeServiceStub(channel),
                nodes=NodeServiceStub(channel),
                operation_service=OperationServiceStub(channel),
            )
    finally:
        await server.grpc.stop(0)
        await execs.drain()
        await core.operations.drain(0)


def create_request(name: str = "a", **fields: Any) -> container_service_pb2.CreateContainerRequest:
    """Return a request that succeeds on the fake engine."""
    return container_service_pb2.CreateContainerRequest(
        name=name, spec=container_pb2.ContainerSpec(image=IMAGE), **fields
    )


async def create_container(server: InMemoryServer, name: str = "a", **fields: Any) -> container_pb2.Container:
    """Create a container; return it."""
    events = [event async for event in server.containers.CreateContainer(create_request(name, **fields))]
    assert all(event.HasField("operation") for event in events[:-1])
    return events[-1].result


async def read_to_end(stream: Any) -> tuple[list[Any], grpc.aio.AioRpcError | None]:
    """Return the rest of a stream, and the error with which it ends."""
    events: list[Any] = []
    try:
        async for event in stream:
            events.append(event)  # noqa: PERF401 - the events before an error are returned too
    except grpc.aio.AioRpcError as error:
        return events, error
    return events, None


def reason_of(error: grpc.aio.AioRpcError | None) -> str:
    """Return the reason in ErrorInfo."""
    assert error is not None
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # the type stubs lack asyncio calls
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    COVERAGE.reasons.add(info.reason)
    return str(info.reason)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Let the server run until a condition holds that no call reports."""
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        while not condition():
            await asyncio.sleep(0)
