"""The real server, core behind it, and fakes behind that, on a unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from gpudock.v1.container_service_pb2_grpc import ContainerServiceStub
from gpudock.v1.node_service_pb2_grpc import NodeServiceStub
from gpudock.v1.operation_service_pb2_grpc import OperationServiceStub
from gpudock_server.core.allocation import Allocator
from gpudock_server.core.containers import Containers, World, saga_builder
from gpudock_server.core.exec_sessions import ExecSessions
from gpudock_server.core.nodes import Nodes
from gpudock_server.core.operations import Operations
from gpudock_server.rpc.server import RpcServer, Services, build_server
from gpudock_server.settings import Settings
from tests.rpc.fakes import (
    LONG_AGO,
    FakeEngine,
    FakeInventory,
    FakeLayers,
    FakeProcesses,
    MemoryStore,
    every_port_is_free,
)

NODE = "gpu1"
HOST = "host1"
PORTS = (20000, 20009)


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs, its parts, and stubs that call it."""

    store: MemoryStore
    engine: FakeEngine
    processes: FakeProcesses
    operations: Operations
    execs: ExecSessions
    server: RpcServer
    channel: grpc.aio.Channel
    containers: ContainerServiceStub
    nodes: NodeServiceStub
    watching: OperationServiceStub


@asynccontextmanager
async def serve(folder: Path) -> AsyncIterator[Served]:
    """Serve on a socket in `folder`; nothing of it is left afterwards."""
    store, engine, inventory, processes = MemoryStore(), FakeEngine(), FakeInventory(), FakeProcesses()
    world = World(
        store=store,
        engine=engine,
        layers=FakeLayers(),
        allocator=Allocator(
            store=store, inventory=inventory, probe=every_port_is_free, host=HOST, port_range=PORTS
        ),
        node=NODE,
        host=HOST,
        settle_seconds=0,
        stop_seconds=10,
    )
    operations = Operations(store, NODE, saga_builder(world))
    execs = ExecSessions(world, processes, hangup_grace=0.2, limit=4)
    containers = Containers(world, operations)
    nodes = Nodes(world, inventory, version="1", start_time=LONG_AGO, port_range=PORTS)
    services = Services(containers=containers, operations=operations, execs=execs, nodes=nodes)
    server = build_server(services, Settings())
    address = f"unix:{folder / 'rpc.sock'}"
    server.grpc.add_insecure_port(address)
    await server.grpc.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Served(
                store=store,
                engine=engine,
                processes=processes,
                operations=operations,
                execs=execs,
                server=server,
                channel=channel,
                containers=ContainerServiceStub(channel),
                nodes=NodeServiceStub(channel),
                watching=OperationServiceStub(channel),
            )
    finally:
        await server.grpc.stop(0)
        await execs.drain()
        await operations.drain(0)
