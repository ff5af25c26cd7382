"""Messages as gpudockd sends them."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from gpudock.v1 import container_service_pb2, volume_service_pb2
from gpudock.v1 import operation_pb2 as pb
from gpudock.v1.container_pb2 import CONTAINER_STATE_RUNNING, Container, ContainerSpec, ContainerStatus
from gpudock.v1.port_pb2 import PORT_PROTOCOL_TCP, PortBinding
from gpudock.v1.volume_pb2 import VOLUME_STATE_READY, Volume

OPERATION_ID = "6fa459ea-ee8a-4ca4-894e-db77e160355e"

SUCCEEDED = pb.OPERATION_STAGE_STATE_SUCCEEDED
RUNNING = pb.OPERATION_STAGE_STATE_RUNNING
PENDING = pb.OPERATION_STAGE_STATE_PENDING


def operation(
    *stages: pb.OperationStage, state: pb.OperationState.ValueType = pb.OPERATION_STATE_RUNNING, message: str = ""
) -> pb.Operation:
    """Return an operation whose current stage is the first running one."""
    current = next((stage.name for stage in stages if stage.state == RUNNING), "")
    return pb.Operation(id=OPERATION_ID, state=state, stages=stages, stage=current, message=message)


def failed_operation(code: int, reason: str) -> pb.Operation:
    """Return an operation that failed."""
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
    """Return a stage; an ended stage took `seconds`."""
    created = pb.OperationStage(name=name, state=state, current_bytes=current_bytes, total_bytes=total_bytes)
    if state != PENDING:
        created.start_time.CopyFrom(Timestamp(seconds=1000))
    if state not in {PENDING, RUNNING}:
        created.end_time.FromNanoseconds(int((1000 + seconds) * 1e9))
    return created


def container(name: str = "train") -> Container:
    """Return a running container with a GPU and a port."""
    binding = PortBinding(container_port=80, host_port=40001, protocol=PORT_PROTOCOL_TCP)
    return Container(
        name=name,
        node="gpu1",
        revision=1,
        spec=ContainerSpec(image="busybox", memory_bytes=2**30),
        status=ContainerStatus(state=CONTAINER_STATE_RUNNING, gpu_uuids=["GPU-1"], ports=[binding]),
    )


def volume(name: str = "data", *containers: str) -> Volume:
    """Return a volume that these containers mount."""
    return Volume(
        name=name,
        node="gpu1",
        state=VOLUME_STATE_READY,
        revision=1,
        size_bytes=2**30,
        attached_containers=containers,
    )


def volume_watch_event(token: str, **event: Any) -> volume_service_pb2.WatchVolumesResponse:
    """Return a message of a watch of volumes; `token` resumes the watch after it."""
    return volume_service_pb2.WatchVolumesResponse(**event, resume_token=token)


def watch_event(token: str, **event: Any) -> container_service_pb2.WatchContainersResponse:
    """Return a message of a watch of containers; `token` resumes the watch after it."""
    return container_service_pb2.WatchContainersResponse(**event, resume_token=token)
