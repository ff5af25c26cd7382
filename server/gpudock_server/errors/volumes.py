"""Errors about volumes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from gpudock_server.errors.base import Code, GpudockError


@dataclass(eq=False)
class VolumeNotFound(GpudockError):
    """No volume has this name."""

    code = Code.NOT_FOUND
    reason = "VOLUME_NOT_FOUND"
    template = "volume {volume!r} not found; existing volumes: {available}"
    volume: str
    available: tuple[str, ...]


@dataclass(eq=False)
class MountedVolumeNotFound(VolumeNotFound):
    """A mount names a volume that does not exist."""

    template = "volume {volume!r} not found; create it before mounting it, or mount one of these: {available}"


@dataclass(eq=False)
class VolumeNotAdopted(VolumeNotFound):
    """The engine has a volume of this name that gpudock did not create."""

    template = (
        "volume {volume!r} exists in the engine only; adopt it first with AdoptVolume (`gpudock volume adopt {volume}`)"
    )


@dataclass(eq=False)
class EngineVolumeNotFound(VolumeNotFound):
    """The engine volume does not exist or may not be adopted; the message does not tell callers which."""

    template = (
        "engine volume {volume!r} not found or not adoptable; the operator allows adoption with the engine label"
        " gpudock.adopt=true or the setting adoptable_volumes"
    )


@dataclass(eq=False)
class AdoptionForbidden(GpudockError):
    """An engine volume of this kind cannot be adopted with any settings."""

    code = Code.PERMISSION_DENIED
    reason = "ADOPTION_FORBIDDEN"
    template = "engine volume {engine_volume!r} cannot be adopted as {volume!r}: {detail}"
    volume: str
    engine_volume: str
    detail: str


@dataclass(eq=False)
class VolumeExists(GpudockError):
    """A volume of gpudock, or an engine volume that gpudock did not create, has this name."""

    code = Code.ALREADY_EXISTS
    reason = "VOLUME_EXISTS"
    template = "volume {volume!r} already exists"
    volume: str
    engine_volume: str = ""


@dataclass(eq=False)
class VolumeRecordLost(VolumeExists):
    """No volume has this name in the store, but the engine has an engine volume with the files of such a volume."""

    template = (
        "volume {volume!r} has no record, but engine volume {engine_volume} still has its files; `gpudock drift` says"
        " why it was not adopted"
    )


@dataclass(eq=False)
class VolumeBusy(GpudockError):
    """Another operation holds the lock of the volume."""

    code = Code.ABORTED
    reason = "VOLUME_BUSY"
    template = "volume {volume!r} is locked by operation {operation_id}; watch the operation, then try again"
    retry_after = timedelta(seconds=1)
    volume: str
    operation_id: str


@dataclass(eq=False)
class StaleVolumeEtag(GpudockError):
    """The volume has changed since the caller read it."""

    code = Code.ABORTED
    reason = "STALE_ETAG"
    template = "volume {volume!r} has changed since etag {etag}; read it again"
    volume: str
    etag: str
    current_etag: str


@dataclass(eq=False)
class VolumeDiffers(GpudockError):
    """The change would mount another engine volume than the container has at that path now."""

    code = Code.FAILED_PRECONDITION
    reason = "VOLUME_DIFFERS"
    template = (
        "container {container!r} mounts engine volume {engine_volume} as volume {volume!r}, but the record of the"
        " volume names {recorded_engine_volume}; this change would replace the files. Remove the mount from the spec"
        " first, or give the volume another name"
    )
    container: str
    volume: str
    engine_volume: str
    recorded_engine_volume: str


@dataclass(eq=False)
class VolumeInUse(GpudockError):
    """The call needs a volume that nothing uses."""

    code = Code.FAILED_PRECONDITION
    reason = "VOLUME_IN_USE"
    template = "volume {volume!r} is in use by {holders}"
    volume: str
    holders: tuple[str, ...]


@dataclass(eq=False)
class EngineVolumeInUse(VolumeInUse):
    """Containers that gpudock does not manage mount the engine volume that is to be adopted."""

    template = "engine volume {engine_volume!r} is in use by {holders}, so it cannot be adopted as {volume!r}"
    engine_volume: str


@dataclass(eq=False)
class VolumeMounted(VolumeInUse):
    """The specs of containers mount the volume that is to be deleted."""

    template = (
        "volume {volume!r} is mounted by {holders}; remove the mount from the spec first, or delete the volume with"
        " force, which removes it from the specs of stopped containers"
    )


@dataclass(eq=False)
class VolumeMountedByRunning(VolumeInUse):
    """Containers that are neither STOPPED nor EXITED mount the volume that is to be deleted with force."""

    template = (
        "volume {volume!r} is mounted by {holders}; force removes a mount only from containers that are STOPPED or"
        " EXITED. Stop {holders} first; roll back or delete a FAILED container"
    )


@dataclass(eq=False)
class VolumeTooSmallForData(GpudockError):
    """The files of the volume do not fit into the requested size; the volume is unchanged."""

    code = Code.FAILED_PRECONDITION
    reason = "VOLUME_TOO_SMALL_FOR_DATA"
    template = (
        "volume {volume!r} cannot shrink to {requested_bytes}; its minimum size is {minimum_bytes} ({used_bytes} used)"
    )
    volume: str
    requested_bytes: int
    used_bytes: int
    minimum_bytes: int


@dataclass(eq=False)
class SizeNotSupported(GpudockError):
    """The requested backend, or no backend of this node, can limit a volume to this size."""

    code = Code.FAILED_PRECONDITION
    reason = "SIZE_NOT_SUPPORTED"
    template = "volume {volume!r} cannot have a size of {size_bytes} on this node: {detail}"
    volume: str
    size_bytes: int
    detail: str


@dataclass(eq=False)
class VolumeFailed(GpudockError):
    """A call to the host failed; the volume and its files are unchanged. `call` is a verb, such as `shrink`."""

    code = Code.FAILED_PRECONDITION
    reason = "VOLUME_FAILED"
    template = "could not {call} volume {volume!r}: {detail}"
    volume: str
    call: str
    detail: str
