"""Domain errors: a reason that programs act on, typed fields, and a sentence for people.

Nothing here knows of gRPC; `code` is a number of google.rpc.Code, the vocabulary that operations store. A subclass is
a dataclass: each of its fields becomes an entry of the error's metadata, so that no dynamic value is found in the
message alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from enum import IntEnum
from typing import ClassVar

from typing_extensions import override

from gpudock_server.sizes import Rounding, size_text


class Code(IntEnum):
    """google.rpc.Code, as far as it is used here."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@dataclass(eq=False)
class GpudockError(Exception):
    """The base of all that a caller may be told."""

    code: ClassVar[Code]
    reason: ClassVar[str]
    # Whether the same call may succeed soon, and after how long a caller should try.
    retry_after: ClassVar[timedelta | None] = None

    # One sentence that says what happened and, where it can, what to do; filled from `metadata`.
    template: ClassVar[str]

    @property
    def message(self) -> str:
        """The sentence for people."""
        return self.template.format_map(
            {field.name: _shown(field.name, getattr(self, field.name)) for field in fields(self)}
        )

    @property
    def metadata(self) -> dict[str, str]:
        """Every dynamic value of the message, as text."""
        return {field.name: _text(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        return self.message


def _shown(name: str, value: object) -> str:
    """A value in a sentence: sizes with a unit, lists with spaces, and what is empty as `none`."""
    if name.endswith("_bytes") and isinstance(value, int):
        return size_text(value, _ROUNDING.get(name, Rounding.NEAREST))
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return str(value) or "none"


# What a caller may ask for instead must not be refused because it was rounded.
_ROUNDING = {
    "minimum_bytes": Rounding.UP,
    "needed_bytes": Rounding.UP,
    "used_bytes": Rounding.UP,
    "available_bytes": Rounding.DOWN,
}


def _text(value: object) -> str:
    if isinstance(value, tuple | list):
        return ",".join(str(item) for item in value)
    return str(value)


@dataclass(frozen=True)
class FieldViolation:
    """What is wrong with one field; `field` is its path in the request, as in `spec.ports[2].host_port`."""

    field: str
    description: str


@dataclass(eq=False)
class InvalidArgument(GpudockError):
    """Everything that is wrong with a request, at once."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"
    violations: tuple[FieldViolation, ...]

    @property
    @override
    def message(self) -> str:
        return "; ".join(f"{violation.field}: {violation.description}" for violation in self.violations)

    @property
    @override
    def metadata(self) -> dict[str, str]:
        return {"fields": _text([violation.field for violation in self.violations])}


@dataclass(eq=False)
class RequestIdReused(GpudockError):
    """A request id came again with other arguments."""

    code = Code.INVALID_ARGUMENT
    reason = "REQUEST_ID_REUSED"
    template = "request_id {request_id} was used before with other arguments; choose a new one"
    request_id: str


@dataclass(eq=False)
class ContainerNotFound(GpudockError):
    """No container has this name."""

    code = Code.NOT_FOUND
    reason = "CONTAINER_NOT_FOUND"
    template = "there is no container {container!r}"
    container: str


@dataclass(eq=False)
class ContainerExists(GpudockError):
    """The name is taken."""

    code = Code.ALREADY_EXISTS
    reason = "CONTAINER_EXISTS"
    template = "container {container!r} exists already"
    container: str


@dataclass(eq=False)
class ContainerRecordLost(ContainerExists):
    """No record has the name, and engine containers of a container of that name are still there."""

    template = (
        "container {container!r} has no record, but the engine still has one or more engine containers of that name;"
        " `gpudock drift` says what to do about them"
    )


@dataclass(eq=False)
class ContainerNotRunning(GpudockError):
    """Something that a container in this state cannot have done to it; `needs` says which state it would take."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_NOT_RUNNING"
    template = "container {container!r} is {state}; {needs}"
    container: str
    state: str
    needs: str = "it must be RUNNING for this"


@dataclass(eq=False)
class ContainerGone(GpudockError):
    """Something that only an engine container can have done to it, and it was removed outside gpudock."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_GONE"
    template = (
        "the engine container of container {container!r} was removed outside gpudock, and with it the files that were"
        " not kept; revisions with files: {revisions}. Roll back to one of these or clone it; roll back with spec_only"
        " to begin with the files of the image; or delete the container"
    )
    container: str
    revisions: tuple[str, ...]


@dataclass(eq=False)
class ScaledContainerNotRunning(ContainerNotRunning):
    """ScaleContainer changes of a stopped container what needs a new process."""

    template = (
        "container {container!r} is {state}; GPUs, /dev/shm and the strategy RECREATE need it RUNNING. To start it with"
        " other GPUs, use StartContainer with `gpus` (`gpudock start --gpus`)"
    )
    needs: str = "to change more than its CPUs and memory, it must be RUNNING"


@dataclass(eq=False)
class ContainerRunning(GpudockError):
    """Something that only a stopped container can have done to it."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_RUNNING"
    template = "container {container!r} is {state}; stop it first, or delete it with force"
    container: str
    state: str


@dataclass(eq=False)
class GpusOfRunningContainer(ContainerRunning):
    """StartContainer with other GPUs than those that a running container has."""

    template = (
        "container {container!r} is {state}; StartContainer gives other GPUs to a stopped container only, use"
        " ScaleContainer (`gpudock scale`)"
    )


@dataclass(eq=False)
class ContainerPaused(GpudockError):
    """Something that a frozen container cannot have done to it."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_PAUSED"
    template = "container {container!r} is paused; unpause it first"
    container: str


@dataclass(eq=False)
class ContainerNotPaused(GpudockError):
    """There is nothing to thaw."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_NOT_PAUSED"
    template = "container {container!r} is {state}, not paused"
    container: str
    state: str


@dataclass(eq=False)
class ContainerBusy(GpudockError):
    """Two operations on one container never run together."""

    code = Code.ABORTED
    reason = "CONTAINER_BUSY"
    template = "operation {operation_id} is at work on container {container!r}; watch it, then try again"
    retry_after = timedelta(seconds=1)
    container: str
    operation_id: str


@dataclass(eq=False)
class StaleEtag(GpudockError):
    """The container is not what the caller has seen."""

    code = Code.ABORTED
    reason = "STALE_ETAG"
    template = "container {container!r} has changed since etag {etag}; read it again"
    container: str
    etag: str
    current_etag: str


@dataclass(eq=False)
class StaleVolumeEtag(GpudockError):
    """The volume is not what the caller has seen."""

    code = Code.ABORTED
    reason = "STALE_ETAG"
    template = "volume {volume!r} has changed since etag {etag}; read it again"
    volume: str
    etag: str
    current_etag: str


@dataclass(eq=False)
class _OtherNodeError(GpudockError):
    """Only the daemon of another node can do what was asked."""

    code = Code.FAILED_PRECONDITION
    reason = "WRONG_NODE"
    node: str
    address: str

    @property
    @override
    def message(self) -> str:
        advice = (
            f"call the daemon there, at {self.address}"
            if self.address
            else "the daemon there does not run, or listens on a unix socket alone"
        )
        return self.template.format_map({**vars(self), "advice": advice})


@dataclass(eq=False)
class WrongNode(_OtherNodeError):
    """Only the daemon beside the engine can change a container."""

    template = "container {container!r} is on node {node!r}; {advice}"
    container: str


@dataclass(eq=False)
class OtherNodeRequested(_OtherNodeError):
    """The request names a node that another daemon serves."""

    template = "node {node!r} is not this one; {advice}"


@dataclass(eq=False)
class VolumeOnOtherNode(_OtherNodeError):
    """Only the daemon beside the engine can change a volume, and only containers beside it can mount it."""

    template = "volume {volume!r} is on node {node!r}; {advice}"
    volume: str


@dataclass(eq=False)
class NodeNotFound(GpudockError):
    """No daemon of this name is alive."""

    code = Code.NOT_FOUND
    reason = "NODE_NOT_FOUND"
    template = "there is no node {node!r} here"
    node: str


@dataclass(eq=False)
class OperationNotFound(GpudockError):
    """No operation has this id, or it ended long ago."""

    code = Code.NOT_FOUND
    reason = "OPERATION_NOT_FOUND"
    template = "there is no operation {operation_id!r}; it may have ended too long ago to be kept"
    operation_id: str


@dataclass(eq=False)
class OperationResultGone(OperationNotFound):
    """It ended well, what it left is no longer kept, and its object is gone or another."""

    template = "operation {operation_id!r} ended well; its result is no longer kept, and its object has gone"


@dataclass(eq=False)
class OperationNotCancellable(GpudockError):
    """It is too late to undo."""

    code = Code.FAILED_PRECONDITION
    reason = "OPERATION_NOT_CANCELLABLE"
    template = "operation {operation_id} is {state} and past the point where it could be undone"
    operation_id: str
    state: str


@dataclass(eq=False)
class OperationOvertaken(GpudockError):
    """The store was put back to an earlier state, and what the engine has is newer than this operation."""

    code = Code.ABORTED
    reason = "OPERATION_OVERTAKEN"
    template = (
        "operation {operation_id} was overtaken: {container} is at revision {revision} in the engine, and the store"
        " had been put back to before that"
    )
    operation_id: str
    container: str
    revision: int


@dataclass(eq=False)
class OperationCancelled(GpudockError):
    """A caller took it back."""

    code = Code.CANCELLED
    reason = "OPERATION_CANCELLED"
    template = "operation {operation_id} was cancelled and undone"
    operation_id: str


@dataclass(eq=False)
class GpuExhausted(GpudockError):
    """Not enough cards that match are free; none was taken."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "GPU_EXHAUSTED"
    template = (
        "{requested} GPUs requested, {matching} of that kind free (the node has {total} in all, {free} free; unhealthy:"
        " {unhealthy})"
    )
    requested: int
    free: int
    matching: int
    total: int
    unhealthy: tuple[str, ...] = ()


@dataclass(eq=False)
class NoGpusShown(GpuExhausted):
    """The driver shows no card at all. `detail` says why, such as that it does not answer."""

    template = "{requested} GPUs requested, and this node shows none: {detail}"
    detail: str = ""


@dataclass(eq=False)
class GpuNotFound(GpudockError):
    """Cards that the driver does not show."""

    code = Code.NOT_FOUND
    reason = "GPU_NOT_FOUND"
    template = "this node has no GPU {uuids}; it has {available}"
    uuids: tuple[str, ...]
    available: tuple[str, ...]


@dataclass(eq=False)
class GpuNotShown(GpuNotFound):
    """As NoGpusShown, for cards that were named."""

    template = "this node has no GPU {uuids}; it shows none: {detail}"
    detail: str


@dataclass(eq=False)
class GpuUnhealthy(GpudockError):
    """A card that must not be handed out."""

    code = Code.FAILED_PRECONDITION
    reason = "GPU_UNHEALTHY"
    template = "GPU {uuid} is {health} and is not handed out: {detail}"
    uuid: str
    health: str
    detail: str


@dataclass(eq=False)
class GpuBusy(GpudockError):
    """A card that was asked for by UUID and is held."""

    code = Code.FAILED_PRECONDITION
    reason = "GPU_BUSY"
    template = "GPU {uuid} is held by container {container!r}"
    uuid: str
    container: str


@dataclass(eq=False)
class PortExhausted(GpudockError):
    """The range is used up; no port was taken."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "PORT_EXHAUSTED"
    template = "{requested} host ports requested, {free} free in {first}-{last}"
    requested: int
    free: int
    first: int
    last: int


@dataclass(eq=False)
class PortInUse(GpudockError):
    """A port that was asked for by number is held, or something on the host listens on it."""

    code = Code.FAILED_PRECONDITION
    reason = "PORT_IN_USE"
    template = "host port {host_port}/{protocol} is in use by {holder}"
    host_port: int
    protocol: str
    holder: str


@dataclass(eq=False)
class PortForbidden(GpudockError):
    """A port that was asked for by number and that containers may not have."""

    code = Code.PERMISSION_DENIED
    reason = "PORT_FORBIDDEN"
    template = (
        "host port {host_port}/{protocol} is not for containers, which may pin {allowed}; the operator adds ports with"
        " pinned_port_ranges"
    )
    host_port: int
    protocol: str
    allowed: tuple[str, ...]


@dataclass(eq=False)
class HealthWatchLimit(GpudockError):
    """Callers without an identity watch the server's health as often as they may."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "HEALTH_WATCH_LIMIT"
    template = "{limit} callers without an identity watch health already; send a token, use the unix socket, or Check"
    limit: int


@dataclass(eq=False)
class ImageNotFound(GpudockError):
    """The image is not on this host, or not for this owner. Names of other images would be told to other tenants."""

    code = Code.NOT_FOUND
    reason = "IMAGE_NOT_FOUND"
    template = "this node has no image {image!r}; correct the name, or have it pulled"
    image: str


@dataclass(eq=False)
class ImageExists(GpudockError):
    """A commit may not take this name from the image that has it."""

    code = Code.ALREADY_EXISTS
    reason = "IMAGE_EXISTS"
    template = "image {image!r} exists and cannot be replaced: {detail}"
    image: str
    detail: str


@dataclass(eq=False)
class ImageNameForbidden(GpudockError):
    """The operator does not let this owner's commits have this name."""

    code = Code.PERMISSION_DENIED
    reason = "IMAGE_NAME_FORBIDDEN"
    template = "images cannot be committed as {repository!r} on this node; allowed is {allowed}"
    repository: str
    allowed: tuple[str, ...]


@dataclass(eq=False)
class ImageDiffers(GpudockError):
    """Files that were written on one image do not simply go with another."""

    code = Code.FAILED_PRECONDITION
    reason = "IMAGE_DIFFERS"
    template = (
        "image {image!r} ({image_id}) is not the one that the files of container {container!r} were written on"
        " ({current_image_id}); say with `files` what is to become of them"
    )
    container: str
    image: str
    image_id: str
    current_image_id: str


@dataclass(eq=False)
class PulledImageDiffers(ImageDiffers):
    """The image of a revision is gone from the engine, and its name leads to another one by now."""

    template = (
        "that revision of container {container!r} stands on image {current_image_id}, which the engine no longer has,"
        " and {image!r} is {image_id} by now; bring that image back (`docker pull` by its digest, or `docker load`),"
        " and call this again"
    )


@dataclass(eq=False)
class RevisionNotFound(GpudockError):
    """No revision of this number, or it was pruned."""

    code = Code.NOT_FOUND
    reason = "REVISION_NOT_FOUND"
    template = "container {container!r} has no revision {revision}; it has {available}"
    container: str
    revision: int
    available: tuple[str, ...]


@dataclass(eq=False)
class RevisionIsCurrent(GpudockError):
    """What a container is cannot be taken out of its history."""

    code = Code.FAILED_PRECONDITION
    reason = "REVISION_IS_CURRENT"
    template = "container {container!r} is at revision {revision}, which therefore cannot be deleted"
    container: str
    revision: int


@dataclass(eq=False)
class SnapshotNotFound(GpudockError):
    """A revision that was kept without its files."""

    code = Code.FAILED_PRECONDITION
    reason = "SNAPSHOT_NOT_FOUND"
    template = "revision {revision} of container {container!r} was kept without its files; return to it with spec_only"
    container: str
    revision: int


@dataclass(eq=False)
class ImagePullFailed(GpudockError):
    """The registry said no, or did not answer."""

    code = Code.FAILED_PRECONDITION
    reason = "IMAGE_PULL_FAILED"
    template = "image {image!r} could not be pulled: {detail}"
    image: str
    detail: str


@dataclass(eq=False)
class VolumeNotFound(GpudockError):
    """No volume has this name."""

    code = Code.NOT_FOUND
    reason = "VOLUME_NOT_FOUND"
    template = "there is no volume {volume!r}; existing volumes: {available}"
    volume: str
    available: tuple[str, ...]


@dataclass(eq=False)
class MountedVolumeNotFound(VolumeNotFound):
    """A mount names a volume that does not exist."""

    template = "there is no volume {volume!r} to mount; create it first, or mount one of these: {available}"


@dataclass(eq=False)
class VolumeNotAdopted(VolumeNotFound):
    """The engine has a volume of this name that somebody else made."""

    template = (
        "volume {volume!r} exists in the engine only; adopt it first with AdoptVolume (`gpudock volume adopt {volume}`)"
    )


@dataclass(eq=False)
class EngineVolumeNotFound(VolumeNotFound):
    """What is to be adopted is not there, or its operator has not allowed it to be adopted: callers cannot tell."""

    template = (
        "the engine has no volume {volume!r} that may be adopted; an operator allows one with the engine label"
        " gpudock.adopt=true, or by its name in the setting adoptable_volumes"
    )


@dataclass(eq=False)
class AdoptionForbidden(GpudockError):
    """An engine volume that nobody may adopt, whoever allows it."""

    code = Code.PERMISSION_DENIED
    reason = "ADOPTION_FORBIDDEN"
    template = "engine volume {engine_volume!r} cannot be adopted as {volume!r}: {detail}"
    volume: str
    engine_volume: str
    detail: str


@dataclass(eq=False)
class VolumeBusy(GpudockError):
    """Two operations on one volume never run together."""

    code = Code.ABORTED
    reason = "VOLUME_BUSY"
    template = "operation {operation_id} is at work on volume {volume!r}; watch it, then try again"
    retry_after = timedelta(seconds=1)
    volume: str
    operation_id: str


@dataclass(eq=False)
class VolumeExists(GpudockError):
    """The name is taken, by a volume of ours or by one of the engine's that somebody else made."""

    code = Code.ALREADY_EXISTS
    reason = "VOLUME_EXISTS"
    template = "volume {volume!r} exists already"
    volume: str
    engine_volume: str = ""


@dataclass(eq=False)
class VolumeRecordLost(VolumeExists):
    """No record has the name, and an engine volume with the files of a volume of that name is still there."""

    template = (
        "volume {volume!r} has no record, but engine volume {engine_volume} with its files is still there; `gpudock"
        " drift` says why it was not adopted"
    )


@dataclass(eq=False)
class VolumeDiffers(GpudockError):
    """A change would mount other files than the container has at the same place now."""

    code = Code.FAILED_PRECONDITION
    reason = "VOLUME_DIFFERS"
    template = (
        "container {container!r} has engine volume {engine_volume} mounted for volume {volume!r}, and the record of"
        " that volume names {recorded_engine_volume}: this change would replace its files; take the mount out of the"
        " spec first, or give the volume another name"
    )
    container: str
    volume: str
    engine_volume: str
    recorded_engine_volume: str


@dataclass(eq=False)
class VolumeInUse(GpudockError):
    """Something that only a volume that nobody has mounted can have done to it."""

    code = Code.FAILED_PRECONDITION
    reason = "VOLUME_IN_USE"
    template = "volume {volume!r} is in use by {holders}"
    volume: str
    holders: tuple[str, ...]


@dataclass(eq=False)
class EngineVolumeInUse(VolumeInUse):
    """An engine volume that containers of others have mounted is to become a volume."""

    template = "engine volume {engine_volume!r} is in use by {holders}, so it cannot be adopted as {volume!r}"
    engine_volume: str


@dataclass(eq=False)
class VolumeMounted(VolumeInUse):
    """A volume is to be deleted that containers have in their specs."""

    template = (
        "volume {volume!r} is mounted by {holders}; remove the mount from the spec first, or delete the volume with"
        " force, which removes it from the specs of stopped containers"
    )


@dataclass(eq=False)
class VolumeMountedByRunning(VolumeInUse):
    """A volume is to be deleted with force, and containers mount it that are neither STOPPED nor EXITED."""

    template = (
        "volume {volume!r} is mounted by {holders}; force removes a mount only from containers that are STOPPED or"
        " EXITED, so stop {holders} first; one that is FAILED is to be rolled back or deleted"
    )


@dataclass(eq=False)
class VolumeTooSmallForData(GpudockError):
    """Found out before anything was changed."""

    code = Code.FAILED_PRECONDITION
    reason = "VOLUME_TOO_SMALL_FOR_DATA"
    template = (
        "volume {volume!r} cannot shrink to {requested_bytes}; the smallest size that it can have now is"
        " {minimum_bytes} ({used_bytes} in use)"
    )
    volume: str
    requested_bytes: int
    used_bytes: int
    minimum_bytes: int


@dataclass(eq=False)
class SizeNotSupported(GpudockError):
    """No backend of this host, or not the one that was asked for, can keep a volume to that size."""

    code = Code.FAILED_PRECONDITION
    reason = "SIZE_NOT_SUPPORTED"
    template = "volume {volume!r} cannot have a size of {size_bytes} on this node: {detail}"
    volume: str
    size_bytes: int
    detail: str


@dataclass(eq=False)
class VolumeFailed(GpudockError):
    """The host refused something that its volumes need; the volume and its data are as they were."""

    code = Code.FAILED_PRECONDITION
    reason = "VOLUME_FAILED"
    template = "could not {call} volume {volume!r}: {detail}"
    volume: str
    call: str
    detail: str


@dataclass(eq=False)
class HostPathForbidden(GpudockError):
    """A mount of a host path outside the allow-list, or of one that has a symbolic link in it, or does not exist."""

    code = Code.PERMISSION_DENIED
    reason = "HOST_PATH_FORBIDDEN"
    template = (
        "host path {host_path!r} cannot be mounted: {detail}; it must exist, lie below one of allowed_host_paths"
        " ({allowed}), and have no symbolic link in it"
    )
    host_path: str
    allowed: tuple[str, ...]
    detail: str


@dataclass(eq=False)
class HostPathFailed(GpudockError):
    """The host cannot bind a host path for a container."""

    code = Code.FAILED_PRECONDITION
    reason = "HOST_PATH_FAILED"
    template = "host path {host_path!r} could not be bound for the container: {detail}"
    host_path: str
    detail: str


@dataclass(eq=False)
class LimitForbidden(GpudockError):
    """A limit above what the node's operator allows for one container."""

    code = Code.PERMISSION_DENIED
    reason = "LIMIT_FORBIDDEN"
    template = "{field} is {requested}; this node allows one container at most {maximum} (its setting {setting})"
    field: str
    requested: int
    maximum: int
    setting: str


@dataclass(eq=False)
class RestartRequired(GpudockError):
    """LIVE was asked of a change that needs a new engine container."""

    code = Code.FAILED_PRECONDITION
    reason = "RESTART_REQUIRED"
    template = "{changes} of container {container!r} cannot change live; use AUTO or RECREATE"
    container: str
    changes: tuple[str, ...]


@dataclass(eq=False)
class StartFailed(GpudockError):
    """The engine could not start it, or it ended at once."""

    code = Code.FAILED_PRECONDITION
    reason = "START_FAILED"
    template = "container {container!r} did not start: {detail}"
    container: str
    detail: str


@dataclass(eq=False)
class LayerCarryFailed(GpudockError):
    """The files could not be carried; they are where they were."""

    code = Code.FAILED_PRECONDITION
    reason = "LAYER_CARRY_FAILED"
    template = "the writable layer could not be carried by {method}: {detail}"
    method: str
    detail: str


@dataclass(eq=False)
class SnapshotFailed(GpudockError):
    """Files could not be kept, or not be brought back; the container's own are where they were."""

    code = Code.FAILED_PRECONDITION
    reason = "SNAPSHOT_FAILED"
    template = "the snapshot could not be made or used: {detail}"
    detail: str


@dataclass(eq=False)
class ExecExists(GpudockError):
    """An exec of this id runs."""

    code = Code.ALREADY_EXISTS
    reason = "EXEC_EXISTS"
    template = "exec {exec_id!r} runs already"
    exec_id: str


@dataclass(eq=False)
class ExecLimit(GpudockError):
    """Each exec costs memory and a connection to the engine."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "EXEC_LIMIT"
    template = "{limit} commands run through this daemon, which is its limit"
    limit: int


@dataclass(eq=False)
class DiskFull(GpudockError):
    """Checked before anything is moved."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "DISK_FULL"
    template = "{path} has {available_bytes} free; {needed_bytes} are needed"
    path: str
    needed_bytes: int
    available_bytes: int


@dataclass(eq=False)
class PoolFull(DiskFull):
    """What the volumes would be promised together is more than their pool may be asked for."""

    template = "{path} has {available_bytes} left for this volume; {needed_bytes} requested"


@dataclass(eq=False)
class EngineUnavailable(GpudockError):
    """The engine did not answer, so nobody knows whether it did what it was asked."""

    code = Code.UNAVAILABLE
    reason = "ENGINE_UNAVAILABLE"
    template = "the container engine is out of reach ({call}: {detail})"
    retry_after = timedelta(seconds=5)
    call: str
    detail: str


@dataclass(eq=False)
class EngineRejected(GpudockError):
    """The engine answered that it will not, or cannot. `status` is the HTTP status of its answer."""

    code = Code.FAILED_PRECONDITION
    reason = "ENGINE_REJECTED"
    template = "the container engine refused to {call}: {detail}"
    call: str
    status: int
    detail: str


@dataclass(eq=False)
class StoreUnavailable(GpudockError):
    """The store did not answer. A write may or may not have happened; the same request_id finds out."""

    code = Code.UNAVAILABLE
    reason = "STORE_UNAVAILABLE"
    template = "etcd is out of reach ({detail}); try again with the same request_id"
    retry_after: ClassVar[timedelta | None] = timedelta(seconds=5)
    detail: str


@dataclass(eq=False)
class StoreFull(StoreUnavailable):
    """The store answers, and takes nothing that needs room. Nothing was written."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "STORE_FULL"
    template = "the store is full: {detail}"
    retry_after = None


@dataclass(eq=False)
class OperationWaitsForRoom(StoreFull):
    """An operation that was under way when the store became full. It is not at its end."""

    template = (
        "the store is full: {detail}; operation {operation_id} waits at its last recorded step, and goes on"
        " when there is room"
    )
    operation_id: str


@dataclass(eq=False)
class RecordUnreadable(GpudockError):
    """What stands at a key of ours is not what this version wrote, or can read."""

    code = Code.DATA_LOSS
    reason = "RECORD_UNREADABLE"
    template = "what the store has at {key} cannot be read: {detail}; restore it from a backup, or delete the key"
    key: str
    detail: str


@dataclass(eq=False)
class ResumeTokenExpired(GpudockError):
    """What the token points at has been compacted away."""

    code = Code.OUT_OF_RANGE
    reason = "RESUME_TOKEN_EXPIRED"
    template = "the page or resume token is too old; begin again"
    token: str


@dataclass(eq=False)
class Recovering(GpudockError):
    """The daemon has not compared records, claims and engine yet, and so changes nothing."""

    code = Code.UNAVAILABLE
    reason = "RECOVERING"
    template = "this daemon has just started and is comparing its records with the engine; it takes no changes yet"
    retry_after = timedelta(seconds=1)


@dataclass(eq=False)
class ShuttingDown(GpudockError):
    """The daemon takes no new work."""

    code = Code.UNAVAILABLE
    reason = "SHUTTING_DOWN"
    template = "this daemon is shutting down; operations go on when it starts again"
    retry_after = timedelta(seconds=5)


@dataclass(eq=False)
class Unauthenticated(GpudockError):
    """Who is calling is not known."""

    code = Code.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"
    detail: str

    @property
    @override
    def message(self) -> str:
        return self.detail


@dataclass(eq=False)
class OperationFailed(GpudockError):
    """The error that an ended operation was recorded with, given to whoever asks later."""

    code = Code.INTERNAL
    reason = "INTERNAL"
    recorded_code: int
    recorded_reason: str
    recorded_message: str
    recorded_metadata: dict[str, str]

    @property
    @override
    def message(self) -> str:
        return self.recorded_message

    @property
    @override
    def metadata(self) -> dict[str, str]:
        return self.recorded_metadata
