"""Messages as gpudockd would send them."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from gpudock.v1 import container_service_pb2, volume_service_pb2
from gpudock.v1 import operation_pb2 as pb
from gpudock.v1.container_pb2 import CONTAINER_STATE_RUNNING, Container, ContainerSpec, ContainerStatus
from gpudock.v1.port_pb2 import PORT_PROTOCOL_TCP, PortBinding
from gpudock.v1.volume_pb2 import VOLUME_STATE_READY, Volume

OPERATION_ID = "6fa459ea-ee8a-4ca4-894e-db77e160355e"

DONE = pb.OPERATION_STAGE_STATE_SUCCEEDED
WORKS = pb.OPERATION_STAGE_STATE_RUNNING
TO_COME = pb.OPERATION_STAGE_STATE_PENDING


def operation(
    *stages: pb.OperationStage, state: pb.OperationState.ValueType = pb.OPERATION_STATE_RUNNING, message: str = ""
) -> pb.Operation:
    """A snapshot, in the first stage that is not done."""
    at_work = next((stage.name for stage in stages if stage.state == WORKS), "")
    return pb.Operation(id=OPERATION_ID, state=state, stages=stages, stage=at_work, message=message)


def failed(code: int, reason: str) -> pb.Operation:
    """The last snapshot of an operation that failed."""
    error = pb.OperationError(code=code, reason=reason)
    return pb.Operation(id=OPERATION_ID, state=pb.OPERATION_STATE_FAILED, error=error)


def stage(
    name: str,
    state: pb.OperationStageState.ValueType,
    *,
    seconds: float = 1.5,
    current_bytes: int = 0,
    total_bytes: int = 0,
) -> pb.OperationStage:
    """A stage; one that has ended took `seconds`."""
    made = pb.OperationStage(name=name, state=state, current_bytes=current_bytes, total_bytes=total_bytes)
    if state != TO_COME:
        made.start_time.CopyFrom(Timestamp(seconds=1000))
    if state not in {TO_COME, WORKS}:
        made.end_time.FromNanoseconds(int((1000 + seconds) * 1e9))
    return made


def container(name: str = "train") -> Container:
    """One that runs, with a card and a port."""
    binding = PortBinding(container_port=80, host_port=40001, protocol=PORT_PROTOCOL_TCP)
    return Container(
        name=name,
        node="gpu1",
        revision=1,
        spec=ContainerSpec(image="busybox", memory_bytes=2**30),
        status=ContainerStatus(state=CONTAINER_STATE_RUNNING, gpu_uuids=["GPU-1"], ports=[binding]),
    )


def volume(name: str = "data", *containers: str) -> Volume:
    """One that these mount."""
    return Volume(
        name=name,
        node="gpu1",
        state=VOLUME_STATE_READY,
        revision=1,
        size_bytes=2**30,
        attached_containers=containers,
    )


def volume_watched(token: str, **event: Any) -> volume_service_pb2.WatchVolumesResponse:
    """As `watched`."""
    return volume_service_pb2.WatchVolumesResponse(**event, resume_token=token)


def watched(token: str, **event: Any) -> container_service_pb2.WatchContainersResponse:
    """A message of a watch, behind which `token` goes on."""
    return container_service_pb2.WatchContainersResponse(**event, resume_token=token)
