"""Converts revisions of containers and their snapshots to messages."""

from __future__ import annotations

from gpudock.v1 import container_revision_pb2 as pb2

from gpudock_server.model.container import RevisionCause
from gpudock_server.model.snapshot import Snapshot, SnapshotKind
from gpudock_server.ports import RevisionView
from gpudock_server.rpc.containers.spec_messages import spec_message
from gpudock_server.rpc.port_messages import port_binding_message
from gpudock_server.rpc.timestamps import timestamp

SNAPSHOT_KINDS = {kind: pb2.SnapshotKind.Value(f"SNAPSHOT_KIND_{kind.name}") for kind in SnapshotKind}

_CAUSES = {cause: pb2.RevisionCause.Value(f"REVISION_CAUSE_{cause.name}") for cause in RevisionCause}


def container_revision_message(view: RevisionView, current: int) -> pb2.ContainerRevision:
    """A revision with its snapshot; `current` is the number of the current revision of its container."""
    revision, snapshot = view.revision, view.snapshot
    return pb2.ContainerRevision(
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


def _snapshot(snapshot: Snapshot) -> pb2.Snapshot:
    return pb2.Snapshot(
        kind=SNAPSHOT_KINDS[snapshot.kind],
        layer_bytes=snapshot.layer_bytes,
        new_bytes=snapshot.new_bytes,
        entries=snapshot.entries,
        create_time=timestamp(snapshot.create_time),
    )
