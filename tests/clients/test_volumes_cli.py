"""`gpudock volume`: its requests and its output."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from gpudock.v1 import operation_pb2, volume_pb2
from gpudock.v1 import volume_service_pb2 as pb

from tests.clients import messages
from tests.clients.command import run
from tests.clients.scripted_server import ScriptedServer, reply_with

MIB = 1 << 20


def _volume(size_bytes: int = 512 * MIB) -> volume_pb2.Volume:
    return volume_pb2.Volume(
        name="data",
        node="gpu1",
        state=volume_pb2.VOLUME_STATE_READY,
        size_bytes=size_bytes,
        used_bytes=MIB,
        backend=volume_pb2.VOLUME_BACKEND_LOOP,
        filesystem="xfs",
        attached_containers=["train"],
    )


async def test_volumes_are_created_listed_and_shown(server: ScriptedServer) -> None:
    server.on("CreateVolume", reply_with(pb.CreateVolumeResponse(volume=_volume())))
    server.on("ListVolumes", reply_with(pb.ListVolumesResponse(volumes=[_volume(), _volume(0)])))
    server.on("GetVolume", reply_with(pb.GetVolumeResponse(volume=_volume())))
    created = await run(server.address, "volume", "create", "data", "512M", "--backend", "loop", "--label", "a=b")
    assert created.code == 0, created.err
    [request] = server.requests["CreateVolume"]
    assert (request.name, request.size_bytes, request.backend) == ("data", 512 * MIB, volume_pb2.VOLUME_BACKEND_LOOP)
    assert dict(request.labels) == {"a": "b"}
    assert request.request_id
    listed = await run(server.address, "volume", "list", "--owner", "alice")
    header, *lines = listed.out.splitlines()
    assert header.split()[:5] == ["NAME", "STATE", "SIZE", "USED", "BACKEND"]
    assert [line.split()[:2] for line in lines] == [["data", "READY"]] * 2
    assert "unlimited" in lines[1]
    assert server.requests["ListVolumes"][0].filter.owner == "alice"
    shown = await run(server.address, "-o", "json", "volume", "get", "data")
    assert json.loads(shown.out)["attached_containers"] == ["train"]


async def _resized(_: Any, __: Any) -> AsyncIterator[pb.ResizeVolumeResponse]:
    yield pb.ResizeVolumeResponse(operation=messages.operation(messages.stage("grow", messages.RUNNING)))
    yield pb.ResizeVolumeResponse(
        operation=messages.operation(
            messages.stage("grow", messages.SUCCEEDED), state=operation_pb2.OPERATION_STATE_SUCCEEDED
        )
    )
    yield pb.ResizeVolumeResponse(result=_volume(1024 * MIB))


async def test_a_resize_shows_its_stages(server: ScriptedServer) -> None:
    server.on("ResizeVolume", _resized)
    ended = await run(server.address, "volume", "resize", "data", "1G")
    assert ended.code == 0, ended.err
    assert ended.err.split()[:2] == ["grow", "done"]
    assert "1.0 GiB" in ended.out
    assert server.requests["ResizeVolume"][0].size_bytes == 1024 * MIB


async def _adopted(_: Any, __: Any) -> AsyncIterator[pb.AdoptVolumeResponse]:
    yield pb.AdoptVolumeResponse(operation=messages.operation(state=operation_pb2.OPERATION_STATE_SUCCEEDED))
    yield pb.AdoptVolumeResponse(result=_volume(0))


async def test_volumes_are_adopted_and_deleted_and_their_revisions_listed(server: ScriptedServer) -> None:
    server.on("AdoptVolume", _adopted)
    server.on("DeleteVolume", reply_with(pb.DeleteVolumeResponse()))
    grown = volume_pb2.VolumeRevision(revision=2, size_bytes=MIB, cause=volume_pb2.VOLUME_REVISION_CAUSE_GROWN)
    server.on("ListVolumeRevisions", reply_with(pb.ListVolumeRevisionsResponse(revisions=[grown])))
    assert (await run(server.address, "volume", "adopt", "data", "old_data")).code == 0
    assert server.requests["AdoptVolume"][0].engine_volume == "old_data"
    listed = await run(server.address, "volume", "revisions", "data")
    assert listed.out.splitlines()[1].split()[:4] == ["2", "1.0", "MiB", "GROWN"]
    assert (await run(server.address, "volume", "delete", "data")).code == 0
    assert server.requests["DeleteVolume"][0].name == "data"
