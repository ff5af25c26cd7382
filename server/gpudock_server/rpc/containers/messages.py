"""Converts containers, their revisions and committed images to messages."""

from gpudock.v1 import committed_image_pb2, container_pb2
from gpudock.v1 import container_revision_pb2 as revision_pb2

from gpudock_server.model.container import Container, ContainerState, ContainerStatus, EngineBinding, RevisionCause
from gpudock_server.model.image import CommittedImage
from gpudock_server.model.snapshot import Snapshot, SnapshotKind
from gpudock_server.ports import ContainerView, RevisionView
from gpudock_server.rpc.containers.spec_messages import spec_message
from gpudock_server.rpc.port_messages import port_binding_message
from gpudock_server.rpc.timestamps import timestamp

STATES = {state: container_pb2.ContainerState.Value(f"CONTAINER_STATE_{state.name}") for state in ContainerState}
SNAPSHOT_KINDS = {kind: revision_pb2.SnapshotKind.Value(f"SNAPSHOT_KIND_{kind.name}") for kind in SnapshotKind}

_CAUSES = {cause: revision_pb2.RevisionCause.Value(f"REVISION_CAUSE_{cause.name}") for cause in RevisionCause}

# Docker's values of State.Health.Status; all others mean that there is no health check.
_HEALTHS = {
    "starting": container_pb2.CONTAINER_HEALTH_STARTING,
    "healthy": container_pb2.CONTAINER_HEALTH_HEALTHY,
    "unhealthy": container_pb2.CONTAINER_HEALTH_UNHEALTHY,
}


def container_view_message(view: ContainerView) -> container_pb2.Container:
    """A container with the operation that holds its lock."""
    return container_message(view.container, view.operation_id)


def container_message(head: Container, operation_id: str = "") -> container_pb2.Container:
    """A container; `operation_id` is the operation that holds its lock, empty for none."""
    return container_pb2.Container(
        name=head.name,
        uid=head.uid,
        node=head.node,
        owner=head.owner,
        etag=head.etag,
        revision=head.revision,
        spec=spec_message(head.spec),
        status=_status(head.status, head.engine, operation_id),
        create_time=timestamp(head.create_time),
        update_time=timestamp(head.update_time),
    )


def _status(status: ContainerStatus, engine: EngineBinding | None, operation_id: str) -> container_pb2.ContainerStatus:
    return container_pb2.ContainerStatus(
        state=STATES[status.state],
        gpu_uuids=status.placement.gpu_uuids,
        ports=[port_binding_message(port) for port in status.placement.ports],
        holds_resources=status.holds_resources,
        engine_id=engine.engine_id if engine else "",
        exit_code=status.exit_code,
        oom_killed=status.oom_killed,
        health=_HEALTHS.get(status.health, container_pb2.CONTAINER_HEALTH_UNSPECIFIED),
        message=status.message,
        start_time=timestamp(status.start_time),
        finish_time=timestamp(status.finish_time),
        operation_id=operation_id,
        restart_count=status.restart_count,
        image_id=engine.image_id if engine else "",
    )


def committed_image_message(image: CommittedImage) -> committed_image_pb2.CommittedImage:
    """An image that CommitContainer created."""
    return committed_image_pb2.CommittedImage(
        id=image.image_id,
        name=image.name,
        size_bytes=image.size_bytes,
        container=image.container,
        revision=image.revision,
        create_time=timestamp(image.create_time),
    )


def container_revision_message(view: RevisionView, current: int) -> revision_pb2.ContainerRevision:
    """A revision with its snapshot; `current` is the number of the current revision of its container."""
    revision, snapshot = view.revision, view.snapshot
    return revision_pb2.ContainerRevision(
        container=revision.container,
        uid=revision.uid,
        revision=revision.revision,
        spec=spec_message(revision.spec),
        cause=_CAUSES[revision.cause],
        gpu_uuids=revision.placement.gpu_uuids,
        ports=[port_binding_message(port) for port in revision.placement.ports],
        image_id=revision.image_id,
        snapshot=_snapshot(snapshot) if snapshot is not None else None,
        layer_bytes=snapshot.layer_bytes if snapshot is not None else 0,
        create_time=timestamp(revision.create_time),
        operation_id=revision.operation_id,
        current=revision.revision == current,
        snapshot_warning=view.snapshot_warning,
    )


def _snapshot(snapshot: Snapshot) -> revision_pb2.Snapshot:
    return revision_pb2.Snapshot(
        kind=SNAPSHOT_KINDS[snapshot.kind],
        layer_bytes=snapshot.layer_bytes,
        new_bytes=snapshot.new_bytes,
        entries=snapshot.entries,
        create_time=timestamp(snapshot.create_time),
    )
