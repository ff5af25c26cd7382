"""The changes that a store transaction consists of.

Either all changes of a transaction are applied or none. The conditions of all changes are checked; `StoreConflict`
carries the first change whose condition does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpudock_server.model.claims import ClaimKey, Holder
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.operation import Operation, RequestRecord
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.snapshot import Snapshot, SnapshotSkipped
from gpudock_server.model.volume import Volume, VolumeRevision


@dataclass(frozen=True, slots=True)
class Lock:
    """Lock a name for an operation. Condition: no operation has locked it."""

    kind: ResourceKind
    name: str
    operation_id: str


@dataclass(frozen=True, slots=True)
class Unlock:
    """Unlock a name. Condition: this operation holds the lock."""

    kind: ResourceKind
    name: str
    operation_id: str


@dataclass(frozen=True, slots=True)
class RequireUnlocked:
    """Condition: no operation has locked the name. Writes nothing."""

    kind: ResourceKind
    name: str


@dataclass(frozen=True, slots=True)
class RequireVolumeVersion:
    """Condition: the version of the volume is `expect`. Writes nothing."""

    name: str
    expect: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim `key` for `holder`. Condition: `key` is free on this host."""

    host: str
    key: ClaimKey
    holder: Holder


@dataclass(frozen=True, slots=True)
class ConfirmClaim:
    """Set the final holder of `key`. Condition: `holder.uid` already holds it."""

    host: str
    key: ClaimKey
    holder: Holder


@dataclass(frozen=True, slots=True)
class ReleaseClaim:
    """Release `key` if `uid` holds it; otherwise do nothing."""

    host: str
    key: ClaimKey
    uid: str


@dataclass(frozen=True, slots=True)
class PutContainer:
    """Write the record of a container. Condition: its version is `expect`; 0: it does not exist."""

    container: Container
    expect: int


@dataclass(frozen=True, slots=True)
class DeleteContainer:
    """Delete the record of a container and its revisions. Condition: the version of the record is `expect`."""

    name: str
    uid: str
    expect: int


@dataclass(frozen=True, slots=True)
class PutRevision:
    """Write a revision of a container. Condition: it does not exist."""

    revision: ContainerRevision


@dataclass(frozen=True, slots=True)
class PutSnapshot:
    """Write the snapshot of a revision, or why it was not made."""

    uid: str
    revision: int
    snapshot: Snapshot | SnapshotSkipped


@dataclass(frozen=True, slots=True)
class DeleteRevision:
    """Delete a revision and the record of its snapshot."""

    uid: str
    revision: int


@dataclass(frozen=True, slots=True)
class PutVolume:
    """Write the record of a volume. Condition: its version is `expect`; 0: it does not exist."""

    volume: Volume
    expect: int


@dataclass(frozen=True, slots=True)
class DeleteVolume:
    """Delete the record of a volume and its revisions. Condition: the version of the record is `expect`."""

    name: str
    uid: str
    expect: int


@dataclass(frozen=True, slots=True)
class PutVolumeRevision:
    """Write a revision of a volume. Condition: it does not exist."""

    revision: VolumeRevision


@dataclass(frozen=True, slots=True)
class PutOperation:
    """Write an operation, which expires by lease once it has ended. Condition: its version is `expect`; 0: none."""

    operation: Operation
    expect: int


@dataclass(frozen=True, slots=True)
class PutRequest:
    """Write the record of a request id. Condition: it is unused. `ended`: no condition; the record expires by lease."""

    request_id: str
    record: RequestRecord
    ended: bool = False


@dataclass(frozen=True, slots=True)
class PutImageOrigin:
    """Write the origin of an image."""

    origin: ImageOrigin


@dataclass(frozen=True, slots=True)
class DeleteImageOrigin:
    """Delete the origin of an image that the engine no longer has."""

    node: str
    image_id: str


StoreChange = (
    Lock
    | Unlock
    | RequireUnlocked
    | RequireVolumeVersion
    | Claim
    | ConfirmClaim
    | ReleaseClaim
    | PutContainer
    | DeleteContainer
    | PutRevision
    | PutSnapshot
    | DeleteRevision
    | PutVolume
    | DeleteVolume
    | PutVolumeRevision
    | PutOperation
    | PutRequest
    | PutImageOrigin
    | DeleteImageOrigin
)
