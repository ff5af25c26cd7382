"""Example records, and connections to etcd for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from gpudock_server.adapters.etcd import EtcdAddress, EtcdConnection
from gpudock_server.model.claims import GpuKey, Holder, PortKey
from gpudock_server.model.container import (
    Container,
    ContainerRevision,
    ContainerState,
    ContainerStatus,
    Placement,
    RevisionCause,
)
from gpudock_server.model.operation import Operation, OperationKind, OperationState
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.spec import ContainerSpec, Protocol
from gpudock_server.model.store_changes import Lock, PutOperation, StoreChange
from gpudock_server.model.volume import Volume, VolumeCause, VolumeRevision, VolumeState

EXAMPLE_TIME = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
RETRY_TIME = timedelta(seconds=5)
GPU, PORT = GpuKey("GPU-1"), PortKey(Protocol.TCP, 8080)


def container(name: str, **changes: object) -> Container:
    """A running container."""
    return Container(
        name=name,
        uid=f"uid-{name}",
        node="n1",
        owner="alice",
        generation=1,
        revision=1,
        spec=ContainerSpec(image="busybox", stop_timeout=timedelta(seconds=3), env={"ß": "\n\0"}),
        status=ContainerStatus(state=ContainerState.RUNNING, start_time=EXAMPLE_TIME),
        create_time=EXAMPLE_TIME,
        update_time=EXAMPLE_TIME,
    ).changed(**changes)


def revision(name: str, number: int) -> ContainerRevision:
    """A revision of a container."""
    return ContainerRevision(
        container=name,
        uid=f"uid-{name}",
        revision=number,
        spec=ContainerSpec(image="busybox"),
        cause=RevisionCause.SCALED,
        placement=Placement(),
        create_time=EXAMPLE_TIME,
        operation_id="op",
    )


def volume(name: str, **changes: object) -> Volume:
    """A volume in state READY."""
    return Volume(
        name=name,
        uid=f"uid-{name}",
        node="n1",
        owner="alice",
        generation=1,
        revision=1,
        state=VolumeState.READY,
        size_bytes=1 << 30,
        create_time=EXAMPLE_TIME,
        update_time=EXAMPLE_TIME,
    ).changed(**changes)


def volume_revision(name: str, number: int) -> VolumeRevision:
    """A revision of a volume."""
    return VolumeRevision(
        volume=name,
        uid=f"uid-{name}",
        revision=number,
        size_bytes=number << 30,
        cause=VolumeCause.GROWN,
        create_time=EXAMPLE_TIME,
        operation_id="op",
    )


def operation(operation_id: str, name: str = "web", **changes: object) -> Operation:
    """A running operation on a container."""
    return Operation(
        id=operation_id,
        kind=OperationKind.CREATE,
        target=ResourceRef(kind=ResourceKind.CONTAINER, name=name, uid=f"uid-{name}"),
        node="n1",
        state=OperationState.RUNNING,
        create_time=EXAMPLE_TIME,
        update_time=EXAMPLE_TIME,
    ).changed(**changes)


def holder(name: str, operation_id: str = "") -> Holder:
    """A container as the holder of a claim."""
    return Holder(container=name, uid=f"uid-{name}", node="n1", operation_id=operation_id)


def begin_changes(operation_id: str, name: str = "web") -> list[StoreChange]:
    """The changes with which every operation begins."""
    return [Lock(ResourceKind.CONTAINER, name, operation_id), PutOperation(operation(operation_id, name), expect=0)]


@asynccontextmanager
async def open_connection(endpoint: str, timeout: float = 2) -> AsyncIterator[EtcdConnection]:
    """A connection whose calls take at most `timeout` seconds."""
    connection = EtcdConnection(EtcdAddress((endpoint,)), timeout=timedelta(seconds=timeout))
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()
