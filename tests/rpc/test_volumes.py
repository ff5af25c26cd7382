"""VolumeService over a real channel: what is refused, what a second call finds, and who waits for whom."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from gpudock.v1 import container_pb2, container_service_pb2, operation_pb2, operation_service_pb2, volume_pb2
from gpudock.v1 import volume_service_pb2 as pb
from gpudock_server.errors import InvalidArgument
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.volume import Volume
from gpudock_server.ports import Versioned
from gpudock_server.rpc.volumes import requests as validation

from tests.rpc.in_memory_server import UUID, InMemoryServer, create_request, read_to_end, reason_of

MIB = 1 << 20


async def created(
    server: InMemoryServer, name: str = "data", size_bytes: int = 64 * MIB, **fields: Any
) -> volume_pb2.Volume:
    """Create a volume to the end."""
    request = pb.CreateVolumeRequest(name=name, size_bytes=size_bytes, **fields)
    return (await server.volumes.CreateVolume(request)).volume


async def resize(
    server: InMemoryServer, size_bytes: int, **fields: Any
) -> tuple[list[Any], grpc.aio.AioRpcError | None]:
    """Resize to the end."""
    request = pb.ResizeVolumeRequest(name="data", size_bytes=size_bytes, **fields)
    return await read_to_end(server.volumes.ResizeVolume(request))


async def refused(call: Any) -> str:
    """The reason of a unary call's error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return reason_of(caught.value)


async def test_a_volume_from_create_to_delete(server: InMemoryServer) -> None:
    made = await created(server, labels={"a": "b"}, owner="alice", request_id=UUID)
    assert (made.state, made.revision, made.node) == (volume_pb2.VOLUME_STATE_READY, 1, "gpu1")
    assert await created(server, labels={"a": "b"}, owner="alice", request_id=UUID) == made
    assert await refused(server.volumes.CreateVolume(pb.CreateVolumeRequest(name="data"))) == "VOLUME_EXISTS"
    events, error = await resize(server, 128 * MIB, etag=made.etag)
    assert error is None
    assert [stage.name for stage in events[-2].operation.stages] == ["grow", "commit"]
    assert events[-2].operation.target.kind == operation_pb2.RESOURCE_KIND_VOLUME
    assert (events[-1].result.size_bytes, events[-1].result.revision) == (128 * MIB, 2)
    _, stale = await resize(server, 256 * MIB, etag=made.etag)
    assert reason_of(stale) == "STALE_ETAG"
    listed = (await server.volumes.ListVolumes(pb.ListVolumesRequest(filter=pb.VolumeFilter(owner="alice")))).volumes
    assert [(one.name, one.used_bytes) for one in listed] == [("data", MIB)]
    history = (await server.volumes.ListVolumeRevisions(pb.ListVolumeRevisionsRequest(name="data"))).revisions
    assert [one.size_bytes for one in history] == [64 * MIB, 128 * MIB]
    operations = await server.operation_service.ListOperations(operation_service_pb2.ListOperationsRequest())
    assert {one.kind for one in operations.operations} == {
        operation_pb2.OPERATION_KIND_CREATE_VOLUME,
        operation_pb2.OPERATION_KIND_RESIZE_VOLUME,
    }
    await server.volumes.DeleteVolume(pb.DeleteVolumeRequest(name="data"))
    assert await refused(server.volumes.GetVolume(pb.GetVolumeRequest(name="data"))) == "VOLUME_NOT_FOUND"


async def test_a_watch_tells_of_volumes_and_of_who_mounts_them(server: InMemoryServer) -> None:
    await created(server)
    call = server.volumes.WatchVolumes(pb.WatchVolumesRequest(filter=pb.VolumeFilter(node="gpu1")))
    told = aiter(call)
    first = await anext(told)
    assert (first.added.name, first.added.HasField("used_bytes")) == ("data", False)
    listed = await anext(told)
    assert listed.checkpoint.list_complete
    request = create_request()
    request.spec.mounts.add(volume="data", target="/data")
    await read_to_end(server.containers.CreateContainer(request))
    mounted = await anext(told)
    assert list(mounted.modified.attached_containers) == ["a"]
    call.cancel()
    # What the list says of the moment is where a watch of the same volumes goes on, and no other.
    resuming = pb.WatchVolumesRequest(filter=pb.VolumeFilter(node="gpu1"), resume_token=listed.resume_token)
    again = aiter(server.volumes.WatchVolumes(resuming))
    assert (await anext(again)).WhichOneof("event") == "checkpoint"
    assert await anext(again) == mounted
    resuming.filter.node = ""
    _, other = await read_to_end(server.volumes.WatchVolumes(resuming))
    assert reason_of(other) == "INVALID_ARGUMENT"
    moment = (await server.volumes.ListVolumes(pb.ListVolumesRequest())).resume_token
    strange = container_service_pb2.WatchContainersRequest(resume_token=moment)
    _, other = await read_to_end(server.containers.WatchContainers(strange))
    assert reason_of(other) == "INVALID_ARGUMENT"


async def test_to_the_size_that_it_has_changes_nothing(server: InMemoryServer) -> None:
    made = await created(server)
    events, error = await resize(server, 64 * MIB)
    assert error is None
    assert (events[-1].result.etag, events[-1].result.revision) == (made.etag, 1)


async def test_what_cannot_be_is_refused_and_leaves_nothing(server: InMemoryServer) -> None:
    await created(server)
    _, error = await resize(server, MIB)
    assert reason_of(error) == "VOLUME_TOO_SMALL_FOR_DATA"
    _, error = await resize(server, 1 << 50)
    assert reason_of(error) == "DISK_FULL"
    full = pb.CreateVolumeRequest(name="more", size_bytes=1 << 50)
    assert await refused(server.volumes.CreateVolume(full)) == "DISK_FULL"
    # What fails while it is made is undone.
    odd = pb.CreateVolumeRequest(name="odd", size_bytes=7 << 40)
    assert await refused(server.volumes.CreateVolume(odd)) == "SIZE_NOT_SUPPORTED"
    assert list(server.store.volume_records) == ["data"]
    assert not server.store.locks


async def test_a_volume_of_another_node(server: InMemoryServer) -> None:
    await created(server)
    head = server.store.volume_records["data"].value
    server.store.volume_records["data"] = Versioned(head.changed(node="gpu2"), 1)
    _, error = await resize(server, 128 * MIB)
    assert reason_of(error) == "WRONG_NODE"
    mounting = create_request(name="a")
    mounting.spec.mounts.append(container_pb2.Mount(volume="data", target="/data"))
    _, error = await read_to_end(server.containers.CreateContainer(mounting))
    assert reason_of(error) == "WRONG_NODE"


async def test_one_that_is_worked_on_is_not_mounted_and_one_that_is_mounted_not_deleted(server: InMemoryServer) -> None:
    await created(server)
    mounting = create_request(name="a")
    mounting.spec.mounts.append(container_pb2.Mount(volume="data", target="/data"))
    server.store.locks[ResourceKind.VOLUME, "data"] = "somebody"
    _, error = await read_to_end(server.containers.CreateContainer(mounting))
    assert reason_of(error) == "VOLUME_BUSY"
    _, error = await resize(server, 128 * MIB)
    assert reason_of(error) == "VOLUME_BUSY"
    del server.store.locks[ResourceKind.VOLUME, "data"]
    _, error = await read_to_end(server.containers.CreateContainer(mounting))
    assert error is None
    assert await refused(server.volumes.DeleteVolume(pb.DeleteVolumeRequest(name="data"))) == "VOLUME_IN_USE"
    seen = (await server.volumes.GetVolume(pb.GetVolumeRequest(name="data"))).volume
    assert list(seen.attached_containers) == ["a"]
    assert isinstance(server.store.volume_records["data"].value, Volume)


def test_every_rule_of_a_request_is_told_at_once() -> None:
    request = pb.CreateVolumeRequest(
        name="No", owner="-", size_bytes=1, backend=volume_pb2.VOLUME_BACKEND_PLAIN, request_id="x"
    )
    request.labels["gpudock.uid"] = "mine"
    with pytest.raises(InvalidArgument) as caught:
        validation.create(request)
    told = {violation.field for violation in caught.value.violations}
    assert told == {"name", "owner", "size_bytes", "backend", "request_id", 'labels["gpudock.uid"]'}
    with pytest.raises(InvalidArgument):
        validation.resize(pb.ResizeVolumeRequest(name="data"))
