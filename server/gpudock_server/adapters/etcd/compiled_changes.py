"""Compiles each kind of StoreChange to etcd: its key, the condition on the key, and the operations. Sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.conditions import (
    Always,
    Condition,
    HeldBy,
    IfHeldBy,
    ValueIs,
    VersionIs,
    holder_of,
    is_holder,
)
from gpudock_server.adapters.etcd.keys import KeyRange, Keys
from gpudock_server.adapters.etcd.messages import KeyValue
from gpudock_server.adapters.etcd.operation_parts import NO_PARTS, OperationParts, Parts
from gpudock_server.adapters.etcd.values import R, decode, decode_snapshot, encode
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.operation import Operation, RequestRecord
from gpudock_server.model.snapshot import Snapshot, SnapshotSkipped
from gpudock_server.model.store_changes import (
    Claim,
    ConfirmClaim,
    DeleteContainer,
    DeleteImageOrigin,
    DeleteRevision,
    DeleteVolume,
    Lock,
    PutContainer,
    PutImageOrigin,
    PutOperation,
    PutRequest,
    PutRevision,
    PutSnapshot,
    PutVolume,
    PutVolumeRevision,
    ReleaseClaim,
    RequireUnlocked,
    RequireVolumeVersion,
    StoreChange,
    Unlock,
)
from gpudock_server.model.volume import Volume, VolumeRevision
from gpudock_server.ports import Versioned


@dataclass(frozen=True, slots=True)
class CompiledChange:
    """A change in terms of etcd.

    `value` is put at `key`, together with `parts`; None deletes the key, together with the ranges `dependents`. With
    `check_only` only the condition is checked. `found` decodes the entry at the key for the error of a conflict.
    """

    change: StoreChange
    key: bytes
    condition: Condition
    found: Callable[[KeyValue], object]
    value: bytes | None = None
    expires: bool = False
    check_only: bool = False
    dependents: tuple[KeyRange, ...] = ()
    parts: Parts = NO_PARTS

    @property
    def needs_lease(self) -> bool:
        """Whether a key that it puts expires."""
        return self.expires or any(part.expires for part in self.parts.puts)

    @property
    def operations(self) -> int:
        """The largest number of etcd operations that it needs."""
        return 1 + len(self.dependents) + len(self.parts.puts) + len(self.parts.deletes)

    def txn_operations(self, entry: KeyValue | None, lease: int) -> list[messages.TxnOperation]:
        """The etcd operations of the change, given the key's current entry and the lease for keys that expire."""
        if self.check_only:
            return []
        if self.value is not None:
            return [
                messages.put(self.key, self.value, lease if self.expires else 0),
                *(messages.put(part.key, part.value, lease if part.expires else 0) for part in self.parts.puts),
                *(messages.delete(key) for key in self.parts.deletes),
            ]
        if isinstance(self.condition, IfHeldBy) and not is_holder(self.condition.uid, entry):
            return []
        return [messages.delete(self.key), *(messages.delete_range(keys) for keys in self.dependents)]


def compile_change(change: StoreChange, keys: Keys, operations: OperationParts) -> CompiledChange:  # noqa: C901, PLR0911, PLR0912 - one case for each kind of change
    """Compile a change."""
    match change:
        case Lock(kind, name, operation_id):
            return CompiledChange(change, keys.lock(kind, name), VersionIs(0), _text, operation_id.encode())
        case Unlock(kind, name, operation_id):
            value = operation_id.encode(errors="surrogateescape")
            return CompiledChange(change, keys.lock(kind, name), ValueIs(value), _text)
        case RequireUnlocked(kind, name):
            return CompiledChange(change, keys.lock(kind, name), VersionIs(0), _text, check_only=True)
        case RequireVolumeVersion(name, expect):
            return CompiledChange(change, keys.volume(name), VersionIs(expect), _versioned(Volume), check_only=True)
        case Claim(host, key, holder):
            return CompiledChange(change, keys.claim(host, key), VersionIs(0), holder_of, encode(holder))
        case ConfirmClaim(host, key, holder):
            return CompiledChange(change, keys.claim(host, key), HeldBy(holder.uid), holder_of, encode(holder))
        case ReleaseClaim(host, key, uid):
            return CompiledChange(change, keys.claim(host, key), IfHeldBy(uid), holder_of)
        case PutContainer(container, expect):
            head = keys.container(container.name)
            return CompiledChange(change, head, VersionIs(expect), _versioned(Container), encode(container))
        case DeleteContainer(name, uid, expect):
            history = (keys.container_revisions(uid), keys.container_snapshots(uid))
            return CompiledChange(
                change, keys.container(name), VersionIs(expect), _versioned(Container), dependents=history
            )
        case PutRevision(revision):
            number = keys.container_revision(revision.uid, revision.revision)
            return CompiledChange(change, number, VersionIs(0), _versioned(ContainerRevision), encode(revision))
        case PutSnapshot(uid, number, snapshot):
            return CompiledChange(
                change, keys.container_snapshot(uid, number), Always(), _versioned_snapshot, encode(snapshot)
            )
        case DeleteRevision(uid, number):
            kept = keys.container_snapshot(uid, number)
            # The range of exactly one key.
            only = (KeyRange(kept, kept + b"\0"),)
            revision_key = keys.container_revision(uid, number)
            return CompiledChange(change, revision_key, Always(), _versioned(ContainerRevision), dependents=only)
        case PutVolume(volume, expect):
            return CompiledChange(
                change, keys.volume(volume.name), VersionIs(expect), _versioned(Volume), encode(volume)
            )
        case DeleteVolume(name, uid, expect):
            past = (keys.volume_revisions(uid),)
            return CompiledChange(change, keys.volume(name), VersionIs(expect), _versioned(Volume), dependents=past)
        case PutVolumeRevision(volume_revision):
            at = keys.volume_revision(volume_revision.uid, volume_revision.revision)
            return CompiledChange(change, at, VersionIs(0), _versioned(VolumeRevision), encode(volume_revision))
        case PutOperation(operation, expect):
            return CompiledChange(
                change,
                keys.operation(operation.id),
                VersionIs(expect),
                _versioned(Operation),
                operations.record(operation),
                operation.state.ended,
                parts=operations.companions(operation),
            )
        case PutRequest(request_id, record, ended):
            unused = Always() if ended else VersionIs(0)
            return CompiledChange(
                change, keys.request(request_id), unused, _versioned(RequestRecord), encode(record), ended
            )
        case PutImageOrigin(origin):
            at = keys.image_origin(origin.node, origin.image_id)
            return CompiledChange(change, at, Always(), _versioned(ImageOrigin), encode(origin))
        case DeleteImageOrigin(node, image_id):
            return CompiledChange(change, keys.image_origin(node, image_id), Always(), _versioned(ImageOrigin))


def _text(entry: KeyValue) -> str:
    return entry.value.decode(errors="replace")


def _versioned_snapshot(entry: KeyValue) -> Versioned[Snapshot | SnapshotSkipped]:
    return Versioned(decode_snapshot(entry.key, entry.value), entry.version)


def _versioned(kind: type[R]) -> Callable[[KeyValue], Versioned[R]]:
    def read(entry: KeyValue) -> Versioned[R]:
        return Versioned(decode(kind, entry.key, entry.value), entry.version)

    return read
