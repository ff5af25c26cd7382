"""Checks of every RPC that reads: their answers agree with each other and with the model."""

from __future__ import annotations

import asyncio

from gpudock.v1 import (
    container_pb2,
    container_service_pb2,
    node_service_pb2,
    operation_pb2,
    operation_service_pb2,
    volume_service_pb2,
)

from tests.calls import Caller
from tests.rig.patience import limit
from tests.stateful.model import ExpectedContainer, ExpectedVolume
from tests.stateful.modelled_host import ModelledHost

_MIB = 1 << 20
# A reconcile pass that was aborted by an engine fault is repeated within so many seconds of an idle machine.
_COMPARED_S = 20.0


async def check_all_reads(host: ModelledHost) -> None:
    """Check all RPCs that read. No operation may be running."""
    await _node(host)
    await _containers(host)
    for container in host.containers.values():
        await _revision(host.caller, container)
    await _volumes(host)
    await _operations(host.caller)
    await _drift(host)


async def _node(host: ModelledHost) -> None:
    nodes = host.caller.nodes
    node = (await nodes.GetNode(node_service_pb2.GetNodeRequest())).node
    held = sum(container.gpus for container in host.containers.values())
    assert (node.name, node.claimed_gpus) == (host.node, held)
    promised = sum(volume.size_mib for volume in host.volumes.values())
    assert node.volume_pool.promised_bytes == promised * _MIB
    ports = (await nodes.ListPorts(node_service_pb2.ListPortsRequest())).ports
    assert len({port.host_port for port in ports}) == len(ports), "a port is held twice"
    shown: dict[str, set[int]] = {}
    for port in ports:
        shown.setdefault(port.container, set()).add(port.host_port)
    for name in host.containers:
        status = (await host.caller.get(name)).status
        assert {port.host_port for port in status.ports} == shown.pop(name, set()), name
    assert not shown, f"ports of unknown containers: {shown}"
    assert all(component.healthy for component in node.components), node.components


async def _containers(host: ModelledHost) -> None:
    containers = host.caller.containers
    listed = (await containers.ListContainers(container_service_pb2.ListContainersRequest())).containers
    states = {
        container.name: container_pb2.ContainerState.Name(container.status.state).removeprefix("CONTAINER_STATE_")
        for container in listed
    }
    assert states == {name: container.state.value for name, container in host.containers.items()}
    watch = containers.WatchContainers(container_service_pb2.WatchContainersRequest())
    watched = []
    async for answer in watch:
        if answer.WhichOneof("event") != "added":
            break
        watched.append(answer.added)
    watch.cancel()
    assert watched == list(listed)


async def _revision(caller: Caller, expected: ExpectedContainer) -> None:
    request = container_service_pb2.GetContainerRevisionRequest(name=expected.name, revision=expected.revision)
    current = (await caller.containers.GetContainerRevision(request)).revision
    assert current.current
    assert current.spec == (await caller.get(expected.name)).spec


async def _volumes(host: ModelledHost) -> None:
    caller = host.caller
    listed = (await caller.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest())).volumes
    assert [volume.name for volume in listed] == sorted(host.volumes)
    for shown in listed:
        expected = host.volumes[shown.name]
        if expected.size_mib:
            # Volumes have few files; the filesystem itself uses most of this.
            assert shown.used_bytes < expected.size_mib * _MIB // 4
        alone = await caller.volume(expected.name)
        assert (alone.size_bytes, alone.etag, alone.used_bytes >= 0) == (shown.size_bytes, shown.etag, True)
        await _volume_history(caller, expected)


async def _volume_history(caller: Caller, expected: ExpectedVolume) -> None:
    request = volume_service_pb2.ListVolumeRevisionsRequest(name=expected.name)
    history = (await caller.volumes.ListVolumeRevisions(request)).revisions
    assert [(kept.revision, kept.size_bytes) for kept in history] == [
        (number, size * _MIB) for number, size in enumerate(expected.sizes, 1)
    ]


async def _operations(caller: Caller) -> None:
    operations = caller.operations
    listed = (await operations.ListOperations(operation_service_pb2.ListOperationsRequest(page_size=1))).operations
    for shown in listed:
        assert shown.state not in (operation_pb2.OPERATION_STATE_RUNNING, operation_pb2.OPERATION_STATE_UNDOING)
        read = await operations.GetOperation(operation_service_pb2.GetOperationRequest(id=shown.id))
        assert read.operation == shown
        watch = operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=shown.id))
        assert (await anext(aiter(watch))).operation == shown
        watch.cancel()


async def _drift(host: ModelledHost) -> None:
    """Every drift names its container, and the last reconcile pass was complete."""
    async with asyncio.timeout(limit(_COMPARED_S)):
        while (answer := await host.caller.nodes.ListDrift(node_service_pb2.ListDriftRequest())).trouble:
            await asyncio.sleep(0.05)
    assert all(entry.container for entry in answer.drift), answer.drift
