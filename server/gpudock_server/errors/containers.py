"""Errors about containers, their revisions, snapshots and exec sessions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from gpudock_server.errors.base import Code, GpudockError


@dataclass(eq=False)
class ContainerNotFound(GpudockError):
    """No container has this name."""

    code = Code.NOT_FOUND
    reason = "CONTAINER_NOT_FOUND"
    template = "container {container!r} not found"
    container: str


@dataclass(eq=False)
class ContainerExists(GpudockError):
    """A container of this name exists."""

    code = Code.ALREADY_EXISTS
    reason = "CONTAINER_EXISTS"
    template = "container {container!r} already exists"
    container: str


@dataclass(eq=False)
class ContainerRecordLost(ContainerExists):
    """No container has this name in the store, but the engine has engine containers of such a container."""

    template = (
        "container {container!r} has no record, but the engine still has engine containers of that name;"
        " `gpudock drift` says what to do about them"
    )


@dataclass(eq=False)
class ContainerNotRunning(GpudockError):
    """The state of the container does not allow the call; `needs` says what the call needs."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_NOT_RUNNING"
    template = "container {container!r} is {state}; {needs}"
    container: str
    state: str
    needs: str = "it must be RUNNING"


@dataclass(eq=False)
class ScaledContainerNotRunning(ContainerNotRunning):
    """ScaleContainer would have to replace the process of a container that is not running."""

    template = (
        "container {container!r} is {state}; it must be RUNNING to scale GPUs or /dev/shm, or for strategy RECREATE. To"
        " start it with other GPUs, use StartContainer with `gpus` (`gpudock start --gpus`)"
    )
    needs: str = "to change more than its CPUs and memory, it must be RUNNING"


@dataclass(eq=False)
class ContainerGone(GpudockError):
    """The call needs the engine container, which was removed outside gpudock."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_GONE"
    template = (
        "the engine container of container {container!r} was removed outside gpudock; files without a snapshot are"
        " lost. Revisions with a snapshot: {revisions}. Roll back to one of these or clone it; roll back with spec_only"
        " to start with the files of the image; or delete the container"
    )
    container: str
    revisions: tuple[str, ...]


@dataclass(eq=False)
class ContainerRunning(GpudockError):
    """The call needs a stopped container."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_RUNNING"
    template = "container {container!r} is {state}; stop it first, or delete it with force"
    container: str
    state: str


@dataclass(eq=False)
class GpusOfRunningContainer(ContainerRunning):
    """StartContainer requests other GPUs for a container that is running."""

    template = (
        "container {container!r} is {state}; StartContainer changes the GPUs of stopped containers only. Use"
        " ScaleContainer (`gpudock scale`)"
    )


@dataclass(eq=False)
class ContainerPaused(GpudockError):
    """The call is not possible while the container is paused."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_PAUSED"
    template = "container {container!r} is paused; unpause it first"
    container: str


@dataclass(eq=False)
class ContainerNotPaused(GpudockError):
    """UnpauseContainer for a container that is not paused."""

    code = Code.FAILED_PRECONDITION
    reason = "CONTAINER_NOT_PAUSED"
    template = "container {container!r} is {state}; it must be PAUSED"
    container: str
    state: str


@dataclass(eq=False)
class ContainerBusy(GpudockError):
    """Another operation holds the lock of the container."""

    code = Code.ABORTED
    reason = "CONTAINER_BUSY"
    template = "container {container!r} is locked by operation {operation_id}; watch the operation, then try again"
    retry_after = timedelta(seconds=1)
    container: str
    operation_id: str


@dataclass(eq=False)
class StaleEtag(GpudockError):
    """The container has changed since the caller read it."""

    code = Code.ABORTED
    reason = "STALE_ETAG"
    template = "container {container!r} has changed since etag {etag}; read it again"
    container: str
    etag: str
    current_etag: str


@dataclass(eq=False)
class RestartRequired(GpudockError):
    """The change needs a new engine container, and the strategy LIVE forbids that."""

    code = Code.FAILED_PRECONDITION
    reason = "RESTART_REQUIRED"
    template = "{changes} of container {container!r} cannot be changed in place; use strategy AUTO or RECREATE"
    container: str
    changes: tuple[str, ...]


@dataclass(eq=False)
class StartFailed(GpudockError):
    """The engine could not start the container, or its process ended at once."""

    code = Code.FAILED_PRECONDITION
    reason = "START_FAILED"
    template = "container {container!r} did not start: {detail}"
    container: str
    detail: str


@dataclass(eq=False)
class LayerCarryFailed(GpudockError):
    """The writable layer could not be transferred to the new engine container; the old one keeps its files."""

    code = Code.FAILED_PRECONDITION
    reason = "LAYER_CARRY_FAILED"
    template = "the writable layer could not be transferred by {method}: {detail}"
    method: str
    detail: str


@dataclass(eq=False)
class RevisionNotFound(GpudockError):
    """The container has no revision of this number; it may have been pruned."""

    code = Code.NOT_FOUND
    reason = "REVISION_NOT_FOUND"
    template = "container {container!r} has no revision {revision}; available: {available}"
    container: str
    revision: int
    available: tuple[str, ...]


@dataclass(eq=False)
class RevisionIsCurrent(GpudockError):
    """The current revision of a container cannot be deleted."""

    code = Code.FAILED_PRECONDITION
    reason = "REVISION_IS_CURRENT"
    template = "revision {revision} is the current revision of container {container!r} and cannot be deleted"
    container: str
    revision: int


@dataclass(eq=False)
class SnapshotNotFound(GpudockError):
    """The revision has no snapshot of its files."""

    code = Code.FAILED_PRECONDITION
    reason = "SNAPSHOT_NOT_FOUND"
    template = "revision {revision} of container {container!r} has no snapshot; roll back with spec_only"
    container: str
    revision: int


@dataclass(eq=False)
class SnapshotFailed(GpudockError):
    """A snapshot could not be created or restored; the files of the container are unchanged."""

    code = Code.FAILED_PRECONDITION
    reason = "SNAPSHOT_FAILED"
    template = "the snapshot could not be created or restored: {detail}"
    detail: str


@dataclass(eq=False)
class ExecExists(GpudockError):
    """A running exec session has this id."""

    code = Code.ALREADY_EXISTS
    reason = "EXEC_EXISTS"
    template = "exec {exec_id!r} is already running"
    exec_id: str


@dataclass(eq=False)
class ExecLimit(GpudockError):
    """The daemon runs the maximum number of exec sessions; each costs memory and a connection to the engine."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "EXEC_LIMIT"
    template = "{limit} exec sessions are running on this daemon, which is the limit"
    limit: int
