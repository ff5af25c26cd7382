"""Typed requests and responses of etcd. aetcd ships no types, so only this file and connection.py use its messages.

aetcd's own methods are not enough: its range reads have neither a limit nor a revision, and its transactions do not
return their revision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NewType, TypeAlias, cast

from aetcd import rpc

from gpudock_server.adapters.etcd.keys import KeyRange

# etcd's default for --max-txn-ops: the limit for the comparisons and for each branch of a transaction.
MAX_TXN_OPERATIONS = 128

# A message of etcd, for which aetcd has no type. The two kinds in a transaction must not be confused.
Message: TypeAlias = Any
Compare = NewType("Compare", object)
TxnOperation = NewType("TxnOperation", object)


@dataclass(frozen=True, slots=True)
class KeyValue:
    """An existing key. `version` is its mod_revision; `lease` is 0 if it has none."""

    key: bytes
    value: bytes
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class RangeResponse:
    """The entries of a range; `more` if the limit cut it off."""

    entries: tuple[KeyValue, ...]
    more: bool

    @property
    def only(self) -> KeyValue | None:
        """The entry found by a read of one key; None if the key does not exist."""
        return self.entries[0] if self.entries else None


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A change of a key: `after` is None if it was deleted, `before` if it was created or etcd has compacted it."""

    key: bytes
    revision: int
    before: KeyValue | None
    after: KeyValue | None
    made: bool


@dataclass(frozen=True, slots=True)
class WatchMessage:
    """A message of a watch. `fragment`: the next message continues the same batch, perhaps the same revision.

    `compacted` is not 0 if the watch has ended because its start was compacted: etcd has everything from that revision
    on. `refusal` says why a watch has ended otherwise.
    """

    changes: tuple[KeyChange, ...]
    fragment: bool
    compacted: int
    refusal: str


@dataclass(frozen=True, slots=True)
class TxnResponse:
    """The response to a transaction. `ranges` are the results of the reads in the executed branch, in order."""

    succeeded: bool
    revision: int
    ranges: tuple[RangeResponse, ...]


def version_is(key: bytes, version: int) -> Compare:
    """The condition that a key has this version; 0 means that it does not exist."""
    # A key that does not exist compares with 0 as its mod_revision.
    return Compare(rpc.Compare(key=key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=version))


def value_is(key: bytes, value: bytes) -> Compare:
    """The condition that a key exists and has this value."""
    return Compare(rpc.Compare(key=key, target=rpc.Compare.VALUE, result=rpc.Compare.EQUAL, value=value))


def put(key: bytes, value: bytes, lease: int = 0) -> TxnOperation:
    """Set a key. Without a lease, the key loses the one it had."""
    return TxnOperation(rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value, lease=lease)))


def delete(key: bytes) -> TxnOperation:
    """Remove a key if it exists."""
    return TxnOperation(rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key)))


def delete_range(keys: KeyRange) -> TxnOperation:
    """Remove every key of a range."""
    return TxnOperation(rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=keys.start, range_end=keys.end)))


def get(key: bytes, revision: int = 0) -> TxnOperation:
    """Read a key at `revision` (0: now)."""
    return TxnOperation(rpc.RequestOp(request_range=rpc.RangeRequest(key=key, revision=revision)))


def get_range(keys: KeyRange, *, limit: int = 0, revision: int = 0, keys_only: bool = False) -> TxnOperation:
    """Read a range in the order of keys: at most `limit` entries (0: all), at `revision` (0: now)."""
    request = rpc.RangeRequest(key=keys.start, range_end=keys.end, limit=limit, revision=revision, keys_only=keys_only)
    return TxnOperation(rpc.RequestOp(request_range=request))


def is_read(operation: TxnOperation) -> bool:
    """Whether the operation is a read."""
    return bool(cast("Message", operation).HasField("request_range"))


def range_request(operation: TxnOperation, *, at: int) -> Message:
    """The request of a read outside a transaction, at revision `at` unless the read names one."""
    request = rpc.RangeRequest()
    request.CopyFrom(cast("Message", operation).request_range)
    request.revision = request.revision or at
    return request


def range_response(response: Message) -> RangeResponse:
    """The response to a read outside a transaction."""
    return RangeResponse(tuple(_entries(response.kvs)), more=bool(response.more))


def txn_request(
    compare: Sequence[Compare], success: Sequence[TxnOperation], failure: Sequence[TxnOperation]
) -> Message:
    """The request of a transaction."""
    return rpc.TxnRequest(compare=compare, success=success, failure=failure)


def txn_response(response: Message) -> TxnResponse:
    """The response to a transaction."""
    return TxnResponse(
        succeeded=bool(response.succeeded),
        revision=int(response.header.revision),
        ranges=tuple(
            range_response(part.response_range) for part in response.responses if part.HasField("response_range")
        ),
    )


def watch_request(keys: KeyRange, start: int) -> Message:
    """The request to watch a range from revision `start` on, with the previous value of each changed key."""
    # In fragments, because a batch is up to a thousand revisions, which could be a message of any size.
    create = rpc.WatchCreateRequest(
        key=keys.start, range_end=keys.end, start_revision=start, prev_kv=True, fragment=True
    )
    return rpc.WatchRequest(create_request=create)


def watch_message(response: Message) -> WatchMessage:
    """A message of a watch."""
    return WatchMessage(
        changes=tuple(_change(event) for event in response.events),
        fragment=bool(response.fragment),
        compacted=int(response.compact_revision) if response.canceled else 0,
        refusal=str(response.cancel_reason or "etcd gave no reason") if response.canceled else "",
    )


def _change(event: Message) -> KeyChange:
    kv = event.kv
    deleted = event.type == rpc.Event.DELETE
    return KeyChange(
        key=bytes(kv.key),
        revision=int(kv.mod_revision),
        before=_entry(event.prev_kv) if event.HasField("prev_kv") else None,
        after=None if deleted else _entry(kv),
        made=not deleted and kv.create_revision == kv.mod_revision,
    )


def _entries(kvs: Iterable[Message]) -> Iterable[KeyValue]:
    return map(_entry, kvs)


def _entry(kv: Message) -> KeyValue:
    return KeyValue(key=bytes(kv.key), value=bytes(kv.value), version=int(kv.mod_revision), lease=int(kv.lease))
