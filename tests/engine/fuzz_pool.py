"""A pool of containers, volumes and operations that random requests refer to, and valid requests for each RPC.

`Pool.restore` restores the pool after a request has changed it. `VALID_REQUESTS` has for each RPC the requests that the
daemon accepts while the pool is complete.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from gpudock.v1 import container_pb2 as container
from gpudock.v1 import container_service_pb2 as containers
from gpudock.v1 import exec_pb2, node_service_pb2, operation_service_pb2, volume_service_pb2

from tests.calls import IDLE, IMAGE, Caller
from tests.rig import Rig

RUNNING, STOPPED, PAUSED = "running", "stopped", "paused"
USED_VOLUME, FREE_VOLUME = "used", "free"
FREE_BYTES = 320 << 20
# A volume of the engine that AdoptVolume accepts.
FOREIGN_VOLUME = "foreign"
# The prefix of the names of containers, volumes and tags that requests create.
_NEW = "new-"

_STATES: Mapping[str, int] = {
    RUNNING: container.CONTAINER_STATE_RUNNING,
    STOPPED: container.CONTAINER_STATE_STOPPED,
    PAUSED: container.CONTAINER_STATE_PAUSED,
}
_NO_FILES = container.SNAPSHOT_POLICY_NEVER
_MOUNT = container.Mount(volume=USED_VOLUME, target="/data")


@dataclass(frozen=True, slots=True)
class References:
    """Identifiers in the pool that requests refer to, besides the names of this module."""

    operation_id: str
    gpu_uuid: str
    node: str
    container_token: str
    volume_token: str

    @property
    def fresh(self) -> str:
        """A name that is not in use."""
        return f"{_NEW}{uuid.uuid4().hex[:12]}"


class Pool:
    """The pool of one daemon."""

    def __init__(self, caller: Caller, rig: Rig) -> None:
        self._caller = caller
        self._rig = rig

    async def restore(self) -> References:
        """Wait until every operation has ended, delete new objects, and create those that are missing or changed."""
        caller = self._caller
        await caller.until_idle()
        listed = await caller.containers.ListContainers(containers.ListContainersRequest(page_size=1000))
        for box in listed.containers:
            name = box.name
            if name not in _STATES or box.status.state != _STATES[name] or not await self._is_usable(box):
                await caller.delete(name)
        volumes = await caller.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest(page_size=1000))
        volume_names = {volume.name for volume in volumes.volumes}
        for name in volume_names - {USED_VOLUME, FREE_VOLUME}:
            await caller.delete_volume(name)
        # The engine ignores this request if the volume exists.
        self._rig.engine.call(
            "POST", "/volumes/create", send={"Name": FOREIGN_VOLUME, "Labels": {"gpudock.adopt": "true"}}
        )
        for name, size in ((USED_VOLUME, 0), (FREE_VOLUME, FREE_BYTES)):
            if name not in volume_names:
                await caller.create_volume(name, size)
        remaining = await caller.containers.ListContainers(containers.ListContainersRequest())
        for name in _STATES.keys() - {box.name for box in remaining.containers}:
            await self._create(name)
        return await self._references()

    async def _is_usable(self, box: container.Container) -> bool:
        """Whether the daemon accepts the requests of `VALID_REQUESTS` for a container of the pool."""
        return (
            box.spec.image == IMAGE
            and box.spec.gpus.count == 1
            and tuple(box.spec.command) == IDLE
            and (box.name != RUNNING or list(box.spec.mounts) == [_MOUNT])
            and [revision.revision for revision in await self._caller.revisions(box.name)][:2] == [1, 2]
        )

    async def _create(self, name: str) -> None:
        """Create a container with two revisions, in its state."""
        caller = self._caller
        await caller.create(name, 1, mounts=[_MOUNT] if name == RUNNING else [])
        await caller.update(name, labels={"pool": name})
        if name == STOPPED:
            await caller.stop(name)
        elif name == PAUSED:
            await caller.containers.PauseContainer(containers.PauseContainerRequest(name=name))

    async def _references(self) -> References:
        caller = self._caller
        operations = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest(page_size=1))
        node = (await caller.nodes.GetNode(node_service_pb2.GetNodeRequest())).node
        gpus = await caller.nodes.ListGpus(node_service_pb2.ListGpusRequest())
        listed = await caller.containers.ListContainers(containers.ListContainersRequest())
        volumes = await caller.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest())
        return References(
            operation_id=operations.operations[0].id,
            gpu_uuid=next(gpu.uuid for gpu in gpus.gpus if not gpu.container),
            node=node.name,
            container_token=listed.resume_token,
            volume_token=volumes.resume_token,
        )


def _spec(**fields: Any) -> container.ContainerSpec:
    return container.ContainerSpec(image=IMAGE, command=IDLE, **fields)


def _exec_start(_: References) -> exec_pb2.ExecContainerRequest:
    request = exec_pb2.ExecContainerRequest()
    request.start.container = RUNNING
    request.start.exec_id = str(uuid.uuid4())
    request.start.command.extend(["true"])
    return request


def _named(message: type[Message], name: str, **fields: Any) -> Callable[[References], Message]:
    return lambda _: message(name=name, **fields)


# For each RPC, requests that the daemon accepts. Each is built just before it is sent, from the current references.
VALID_REQUESTS: Mapping[str, tuple[Callable[[References], Message], ...]] = {
    "CreateContainer": (
        lambda known: containers.CreateContainerRequest(name=known.fresh, spec=_spec()),
        lambda known: containers.CreateContainerRequest(
            name=known.fresh,
            owner="team@example.com",
            create_only=True,
            request_id=str(uuid.uuid4()),
            spec=_spec(
                env={"A": "1"},
                labels={"a": "b"},
                gpus=container.GpuRequest(count=1),
                cpus=0.5,
                memory_bytes=64 << 20,
                mounts=[container.Mount(volume=FREE_VOLUME, target="/free")],
                ports=[container.PortRequest(container_port=80)],
            ),
        ),
        lambda known: containers.CreateContainerRequest(name=known.fresh, spec=_spec(), validate_only=True),
    ),
    "GetContainer": (_named(containers.GetContainerRequest, RUNNING),),
    "ListContainers": (lambda _: containers.ListContainersRequest(page_size=2),),
    "WatchContainers": (
        lambda _: containers.WatchContainersRequest(),
        lambda known: containers.WatchContainersRequest(resume_token=known.container_token),
    ),
    "StartContainer": (
        _named(containers.StartContainerRequest, STOPPED),
        _named(containers.StartContainerRequest, STOPPED, gpus=container.GpuRequest(), snapshots=_NO_FILES),
        _named(containers.StartContainerRequest, RUNNING),
    ),
    "StopContainer": (
        _named(containers.StopContainerRequest, RUNNING),
        _named(containers.StopContainerRequest, RUNNING, keep_resources=True),
        _named(containers.StopContainerRequest, STOPPED),
    ),
    "RestartContainer": (
        _named(containers.RestartContainerRequest, RUNNING),
        _named(containers.RestartContainerRequest, STOPPED, validate_only=True),
    ),
    "PauseContainer": (
        _named(containers.PauseContainerRequest, RUNNING),
        _named(containers.PauseContainerRequest, PAUSED),
    ),
    "UnpauseContainer": (
        _named(containers.UnpauseContainerRequest, PAUSED),
        _named(containers.UnpauseContainerRequest, RUNNING),
    ),
    "DeleteContainer": (
        _named(containers.DeleteContainerRequest, STOPPED),
        _named(containers.DeleteContainerRequest, RUNNING, force=True),
    ),
    "ScaleContainer": (
        _named(containers.ScaleContainerRequest, RUNNING, cpus=1.5),
        _named(containers.ScaleContainerRequest, RUNNING, gpus=container.GpuRequest(count=1), validate_only=True),
        _named(containers.ScaleContainerRequest, RUNNING, gpus=container.GpuRequest(count=2), snapshots=_NO_FILES),
    ),
    "UpdateContainer": (
        _named(containers.UpdateContainerRequest, RUNNING, spec=container.ContainerSpec(labels={"a": "b"})),
        _named(containers.UpdateContainerRequest, STOPPED, spec=container.ContainerSpec(env={"A": "2"})),
        _named(
            containers.UpdateContainerRequest,
            RUNNING,
            spec=container.ContainerSpec(hostname="fuzzed"),
            validate_only=True,
        ),
    ),
    "RollbackContainer": (
        _named(containers.RollbackContainerRequest, STOPPED, revision=1, spec_only=True),
        _named(containers.RollbackContainerRequest, RUNNING, revision=1, validate_only=True),
    ),
    "CloneContainer": (
        lambda known: containers.CloneContainerRequest(name=known.fresh, source=STOPPED, create_only=True),
        lambda known: containers.CloneContainerRequest(name=known.fresh, source=RUNNING, validate_only=True),
    ),
    "GetContainerRevision": (
        _named(containers.GetContainerRevisionRequest, RUNNING, revision=1),
        _named(containers.GetContainerRevisionRequest, RUNNING),
    ),
    "ListContainerRevisions": (_named(containers.ListContainerRevisionsRequest, RUNNING, page_size=1),),
    "DeleteContainerRevision": (_named(containers.DeleteContainerRevisionRequest, STOPPED, revision=1),),
    "CommitContainer": (
        lambda known: containers.CommitContainerRequest(name=STOPPED, repository="fuzzed/image", tag=known.fresh),
        lambda known: containers.CommitContainerRequest(
            name=RUNNING, repository="fuzzed/image", tag=known.fresh, validate_only=True
        ),
    ),
    "ExecContainer": (_exec_start,),
    "CreateVolume": (lambda known: volume_service_pb2.CreateVolumeRequest(name=known.fresh, labels={"a": "b"}),),
    "GetVolume": (_named(volume_service_pb2.GetVolumeRequest, USED_VOLUME),),
    "ListVolumes": (lambda _: volume_service_pb2.ListVolumesRequest(page_size=1),),
    "WatchVolumes": (
        lambda _: volume_service_pb2.WatchVolumesRequest(),
        lambda known: volume_service_pb2.WatchVolumesRequest(resume_token=known.volume_token),
    ),
    "ResizeVolume": (
        _named(volume_service_pb2.ResizeVolumeRequest, FREE_VOLUME, size_bytes=FREE_BYTES + (8 << 20)),
        _named(volume_service_pb2.ResizeVolumeRequest, FREE_VOLUME, size_bytes=FREE_BYTES * 2, validate_only=True),
    ),
    "DeleteVolume": (
        _named(volume_service_pb2.DeleteVolumeRequest, FREE_VOLUME),
        _named(volume_service_pb2.DeleteVolumeRequest, USED_VOLUME),
    ),
    "ListVolumeRevisions": (_named(volume_service_pb2.ListVolumeRevisionsRequest, USED_VOLUME),),
    "AdoptVolume": (
        lambda known: volume_service_pb2.AdoptVolumeRequest(name=known.fresh, engine_volume=FOREIGN_VOLUME),
    ),
    "GetNode": (lambda _: node_service_pb2.GetNodeRequest(),),
    "ListGpus": (lambda _: node_service_pb2.ListGpusRequest(page_size=3),),
    "ListPorts": (lambda _: node_service_pb2.ListPortsRequest(page_size=3),),
    "ListDrift": (lambda _: node_service_pb2.ListDriftRequest(),),
    "GetOperation": (lambda known: operation_service_pb2.GetOperationRequest(id=known.operation_id),),
    "ListOperations": (lambda _: operation_service_pb2.ListOperationsRequest(page_size=2),),
    "WatchOperation": (lambda known: operation_service_pb2.WatchOperationRequest(id=known.operation_id),),
    "CancelOperation": (lambda known: operation_service_pb2.CancelOperationRequest(id=known.operation_id),),
}
