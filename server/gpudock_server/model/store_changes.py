"""What a transaction on the store is made of.

A transaction is a list of these. All of them happen, or none: each that names a condition is checked, and the first
that does not hold is what `StoreConflict` carries.
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
    """Condition: no operation has the name locked."""

    kind: ResourceKind
    name: str
    operation_id: str


@dataclass(frozen=True, slots=True)
class Unlock:
    """Condition: this operation holds the lock."""

    kind: ResourceKind
    name: str
    operation_id: str


@dataclass(frozen=True, slots=True)
class RequireUnlocked:
    """Condition, and nothing else: no operation has the name locked."""

    kind: ResourceKind
    name: str


@dataclass(frozen=True, slots=True)
class RequireVolumeVersion:
    """Condition, and nothing else: the volume's version is `expect`."""

    name: str
    expect: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Condition: nobody holds `key` on this host."""

    host: str
    key: ClaimKey
    holder: Holder


@dataclass(frozen=True, slots=True)
class ConfirmClaim:
    """Gives `key` its final holder; condition: `holder.uid` holds it already."""

    host: str
    key: ClaimKey
    holder: Holder


@dataclass(frozen=True, slots=True)
class ReleaseClaim:
    """Gives `key` back if `uid` holds it; what another holds, or nobody, is left alone."""

    host: str
    key: ClaimKey
    uid: str


@dataclass(frozen=True, slots=True)
class PutContainer:
    """Condition: the head's version is `expect`; 0 is "there is none"."""

    container: Container
    expect: int


@dataclass(frozen=True, slots=True)
class DeleteContainer:
    """Removes a head and all its revisions; condition: the head's version is `expect`."""

    name: str
    uid: str
    expect: int


@dataclass(frozen=True, slots=True)
class PutRevision:
    """Condition: this revision does not exist."""

    revision: ContainerRevision


@dataclass(frozen=True, slots=True)
class PutSnapshot:
    """Says that the files of a revision are kept, or why they could not be."""

    uid: str
    revision: int
    snapshot: Snapshot | SnapshotSkipped


@dataclass(frozen=True, slots=True)
class DeleteRevision:
    """Takes a revision, and what is said of its snapshot, out of the history."""

    uid: str
    revision: int


@dataclass(frozen=True, slots=True)
class PutVolume:
    """Condition: the volume's version is `expect`; 0 is "there is none"."""

    volume: Volume
    expect: int


@dataclass(frozen=True, slots=True)
class DeleteVolume:
    """Removes a volume's head and all its revisions; condition: the head's version is `expect`."""

    name: str
    uid: str
    expect: int


@dataclass(frozen=True, slots=True)
class PutVolumeRevision:
    """Condition: this revision does not exist."""

    revision: VolumeRevision


@dataclass(frozen=True, slots=True)
class PutOperation:
    """Condition: the operation's version is `expect`; 0 is "there is none". An ended one expires by lease."""

    operation: Operation
    expect: int


@dataclass(frozen=True, slots=True)
class PutRequest:
    """Condition: nobody used this request id. `ended`: from now it expires by lease, and the condition is dropped."""

    request_id: str
    record: RequestRecord
    ended: bool = False


@dataclass(frozen=True, slots=True)
class PutImageOrigin:
    """Says where an image of a node's engine came from."""

    origin: ImageOrigin


@dataclass(frozen=True, slots=True)
class DeleteImageOrigin:
    """Forgets where an image came from, which the engine no longer has."""

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
