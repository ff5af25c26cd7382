"""Converts volumes and their revisions to messages."""

from __future__ import annotations

from gpudock.v1 import volume_pb2

from gpudock_server.model.volume import Volume, VolumeBackendKind, VolumeCause, VolumeRevision, VolumeState
from gpudock_server.ports import VolumeDetails
from gpudock_server.rpc.timestamps import timestamp

STATES = {state: volume_pb2.VolumeState.Value(f"VOLUME_STATE_{state.name}") for state in VolumeState}
BACKENDS = {kind: volume_pb2.VolumeBackend.Value(f"VOLUME_BACKEND_{kind.name}") for kind in VolumeBackendKind}

_CAUSES = {cause: volume_pb2.VolumeRevisionCause.Value(f"VOLUME_REVISION_CAUSE_{cause.name}") for cause in VolumeCause}


def volume_details_message(details: VolumeDetails) -> volume_pb2.Volume:
    """A volume with the containers that mount it, the bytes in use, and the operation that holds its lock."""
    message = volume_message(details.view.volume)
    message.attached_containers.extend(details.containers)
    message.operation_id = details.view.operation_id
    if details.used_bytes is not None:
        message.used_bytes = details.used_bytes
    return message


def volume_message(head: Volume) -> volume_pb2.Volume:
    """A volume as it is recorded."""
    backing = head.backing
    return volume_pb2.Volume(
        name=head.name,
        uid=head.uid,
        node=head.node,
        owner=head.owner,
        etag=head.etag,
        revision=head.revision,
        state=STATES[head.state],
        size_bytes=head.size_bytes,
        backend=BACKENDS[backing.kind] if backing else volume_pb2.VOLUME_BACKEND_UNSPECIFIED,
        filesystem=backing.filesystem if backing else "",
        mountpoint=head.mountpoint,
        labels=head.labels,
        create_time=timestamp(head.create_time),
        update_time=timestamp(head.update_time),
    )


def volume_revision_message(revision: VolumeRevision) -> volume_pb2.VolumeRevision:
    """A revision of a volume."""
    return volume_pb2.VolumeRevision(
        volume=revision.volume,
        uid=revision.uid,
        revision=revision.revision,
        size_bytes=revision.size_bytes,
        cause=_CAUSES[revision.cause],
        create_time=timestamp(revision.create_time),
        operation_id=revision.operation_id,
    )
