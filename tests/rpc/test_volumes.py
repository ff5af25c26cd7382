"""VolumeService over a channel: refusals, repeated calls, watches and locks."""

from __future__ import annotations

import pytest
from gpudock.v1 import container_pb2, container_service_pb2, operation_pb2, operation_service_pb2, volume_pb2
from gpudock.v1 import volume_service_pb2 as pb
from gpudock_server.errors import InvalidArgument
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.volume import Volume
from gpudock_server.ports import Versioned
from gpudock_server.rpc.volumes import requests as validation

from tests.rpc.in_memory_server import UUID, InMemoryServer, create_request, read_to_end, reason_of
from tests.rpc.volume_calls import MIB, create_volume, error_reason, resize


async def test_a_volume_from_create_to_delete(server: InMemoryServer) -> None:
    volume = await create_volume(server, labels={"a": "b"}, owner="alice", request_id=UUID)
    assert (volume.state, volume.revision, volume.node) == (volume_pb2.VOLUME_STATE_READY, 1, "gpu1")
    assert await create_volume(server, labels={"a": "b"}, owner="alice", request_id=UUID) == volume
    assert await error_reason(server.volumes.CreateVolume(pb.CreateVolumeRequest(name="data"))) == "VOLUME_EXISTS"
    events, error = await resize(server, 128 * MIB, etag=volume.etag)
    assert error is None
    assert [stage.name for stage in events[-2].operation.stages] == ["grow", "commit"]
    assert events[-2].operation.target.kind == operation_pb2.RESOURCE_KIND_VOLUME
    assert (events[-1].result.size_bytes, events[-1].result.revision) == (128 * MIB, 2)
    _, stale = await resize(server, 256 * MIB, etag=volume.etag)
    assert reason_of(stale) == "STALE_ETAG"
    listed = (await server.volumes.ListVolumes(pb.ListVolumesRequest(filter=pb.VolumeFilter(owner="alice")))).volumes
    assert [(found.name, found.used_bytes) for found in listed] == [("data", MIB)]
    history = (await server.volumes.ListVolumeRevisions(pb.ListVolumeRevisionsRequest(name="data"))).revisions
    assert [revision.size_bytes for revision in history] == [64 * MIB, 128 * MIB]
    operations = await server.operation_service.ListOperations(operation_service_pb2.ListOperationsRequest())
    assert {operation.kind for operation in operations.operations} == {
        operation_pb2.OPERATION_KIND_CREATE_VOLUME,
        operation_pb2.OPERATION_KIND_RESIZE_VOLUME,
    }
    await server.volumes.DeleteVolume(pb.DeleteVolumeRequest(name="data"))
    assert await error_reason(server.volumes.GetVolume(pb.GetVolumeRequest(name="data"))) == "VOLUME_NOT_FOUND"


async def test_a_watch_reports_volumes_and_the_containers_that_mount_them(server: InMemoryServer) -> None:
    await create_volume(server)
    call = server.volumes.WatchVolumes(pb.WatchVolumesRequest(filter=pb.VolumeFilter(node="gpu1")))
    events = aiter(call)
    first = await anext(events)
    assert (first.added.name, first.added.HasField("used_bytes")) == ("data", False)
    listed = await anext(events)
    assert listed.checkpoint.list_complete
    request = create_request()
    request.spec.mounts.add(volume="data", target="/data")
    await read_to_end(server.containers.CreateContainer(request))
    mounted = await anext(events)
    assert list(mounted.modified.attached_containers) == ["a"]
    call.cancel()
    # The token of the list continues a watch with the same filter, and no other watch.
    resuming = pb.WatchVolumesRequest(filter=pb.VolumeFilter(node="gpu1"), resume_token=listed.resume_token)
    resumed = aiter(server.volumes.WatchVolumes(resuming))
    assert (await anext(resumed)).WhichOneof("event") == "checkpoint"
    assert await anext(resumed) == mounted
    resuming.filter.node = ""
    _, other = await read_to_end(server.volumes.WatchVolumes(resuming))
    assert reason_of(other) == "INVALID_ARGUMENT"
    token = (await server.volumes.ListVolumes(pb.ListVolumesRequest())).resume_token
    request_with_token = container_service_pb2.WatchContainersRequest(resume_token=token)
    _, other = await read_to_end(server.containers.WatchContainers(request_with_token))
    assert reason_of(other) == "INVALID_ARGUMENT"


async def test_a_resize_to_the_current_size_changes_nothing(server: InMemoryServer) -> None:
    volume = await create_volume(server)
    events, error = await resize(server, 64 * MIB)
    assert error is None
    assert (events[-1].result.etag, events[-1].result.revision) == (volume.etag, 1)


async def test_impossible_sizes_are_refused_and_leave_nothing(server: InMemoryServer) -> None:
    await create_volume(server)
    _, error = await resize(server, MIB)
    assert reason_of(error) == "VOLUME_TOO_SMALL_FOR_DATA"
    _, error = await resize(server, 1 << 50)
    assert reason_of(error) == "DISK_FULL"
    full = pb.CreateVolumeRequest(name="more", size_bytes=1 << 50)
    assert await error_reason(server.volumes.CreateVolume(full)) == "DISK_FULL"
    # A creation that fails is undone.
    odd = pb.CreateVolumeRequest(name="odd", size_bytes=7 << 40)
    assert await error_reason(server.volumes.CreateVolume(odd)) == "SIZE_NOT_SUPPORTED"
    assert list(server.store.volume_records) == ["data"]
    assert not server.store.locks


async def test_a_volume_of_another_node_is_neither_resized_nor_mounted(server: InMemoryServer) -> None:
    await create_volume(server)
    record = server.store.volume_records["data"].value
    server.store.volume_records["data"] = Versioned(record.changed(node="gpu2"), 1)
    _, error = await resize(server, 128 * MIB)
    assert reason_of(error) == "WRONG_NODE"
    mounting = create_request(name="a")
    mounting.spec.mounts.append(container_pb2.Mount(volume="data", target="/data"))
    _, error = await read_to_end(server.containers.CreateContainer(mounting))
    assert reason_of(error) == "WRONG_NODE"


async def test_a_locked_volume_is_not_mounted_and_a_mounted_volume_is_not_deleted(server: InMemoryServer) -> None:
    await create_volume(server)
    mounting = create_request(name="a")
    mounting.spec.mounts.append(container_pb2.Mount(volume="data", target="/data"))
    server.store.locks[ResourceKind.VOLUME, "data"] = "other"
    _, error = await read_to_end(server.containers.CreateContainer(mounting))
    assert reason_of(error) == "VOLUME_BUSY"
    _, error = await resize(server, 128 * MIB)
    assert reason_of(error) == "VOLUME_BUSY"
    del server.store.locks[ResourceKind.VOLUME, "data"]
    _, error = await read_to_end(server.containers.CreateContainer(mounting))
    assert error is None
    assert await error_reason(server.volumes.DeleteVolume(pb.DeleteVolumeRequest(name="data"))) == "VOLUME_IN_USE"
    volume = (await server.volumes.GetVolume(pb.GetVolumeRequest(name="data"))).volume
    assert list(volume.attached_containers) == ["a"]
    assert isinstance(server.store.volume_records["data"].value, Volume)


def test_all_violations_of_a_request_are_reported_together() -> None:
    request = pb.CreateVolumeRequest(
        name="No", owner="-", size_bytes=1, backend=volume_pb2.VOLUME_BACKEND_PLAIN, request_id="x"
    )
    request.labels["gpudock.uid"] = "mine"
    with pytest.raises(InvalidArgument) as caught:
        validation.create(request)
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"name", "owner", "size_bytes", "backend", "request_id", 'labels["gpudock.uid"]'}
    with pytest.raises(InvalidArgument):
        validation.resize(pb.ResizeVolumeRequest(name="data"))
