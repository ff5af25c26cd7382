"""etcd's requests and answers, typed. aetcd ships no types, so its generated messages stay behind this file.

aetcd's own methods are passed by where they fall short: its ranges take neither a limit nor a revision, and its
transactions hide the revision at which they happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NewType, TypeAlias, cast

from aetcd import rpc

from gpudock_server.adapters.etcd.keys import KeyRange

# etcd's default for --max-txn-ops: neither the comparisons nor either branch of a transaction may be longer.
MAX_TXN_OPERATIONS = 128

# Messages of etcd's; aetcd ships no types for them. Two kinds go into a transaction and must not be mixed up.
Message: TypeAlias = Any
Compare = NewType("Compare", object)
TxnOperation = NewType("TxnOperation", object)


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key that exists. `version` is its mod_revision, `lease` 0 where it has none."""

    key: bytes
    value: bytes
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class RangeResponse:
    """What a range holds. `more`: the limit cut it off."""

    entries: tuple[KeyValue, ...]
    more: bool

    @property
    def only(self) -> KeyValue | None:
        """What a read of one key found."""
        return self.entries[0] if self.entries else None


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What became of a key: `after` is None where it was deleted, `before` where it was made or etcd forgot it."""

    key: bytes
    revision: int
    before: KeyValue | None
    after: KeyValue | None
    made: bool


@dataclass(frozen=True, slots=True)
class WatchMessage:
    """A message of a watch. `fragment`: the next one goes on with the same batch, perhaps in the same revision.

    `compacted` is not 0 when the watch has ended because etcd no longer has what it asks for; it holds everything from
    that revision on. `refusal` says why it ended otherwise.
    """

    changes: tuple[KeyChange, ...]
    fragment: bool
    compacted: int
    refusal: str


@dataclass(frozen=True, slots=True)
class TxnResponse:
    """How a transaction went. `ranges` are the answers of the reads in the branch that was taken, in their order."""

    succeeded: bool
    revision: int
    ranges: tuple[RangeResponse, ...]


def version_is(key: bytes, version: int) -> Compare:
    """The condition that a key has this version; 0 is "there is none"."""
    # A key that does not exist compares with 0 as its mod_revision.
    return Compare(rpc.Compare(key=key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=version))


def value_is(key: bytes, value: bytes) -> Compare:
    """The condition that a key exists and has this value."""
    return Compare(rpc.Compare(key=key, target=rpc.Compare.VALUE, result=rpc.Compare.EQUAL, value=value))


def put(key: bytes, value: bytes, lease: int = 0) -> TxnOperation:
    """Set a key; without a lease, it loses the one it had."""
    return TxnOperation(rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value, lease=lease)))


def delete(key: bytes) -> TxnOperation:
    """Remove a key if it exists."""
    return TxnOperation(rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key)))


def delete_range(keys: KeyRange) -> TxnOperation:
    """Remove every key of a range."""
    return TxnOperation(rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=keys.start, range_end=keys.end)))


def get(key: bytes, revision: int = 0) -> TxnOperation:
    """Read a key, as it was at `revision` or is now (0)."""
    return TxnOperation(rpc.RequestOp(request_range=rpc.RangeRequest(key=key, revision=revision)))


def get_range(keys: KeyRange, *, limit: int = 0, revision: int = 0, keys_only: bool = False) -> TxnOperation:
    """Read a range in the order of its keys, at most `limit` (0: all), at `revision` (0: now)."""
    request = rpc.RangeRequest(key=keys.start, range_end=keys.end, limit=limit, revision=revision, keys_only=keys_only)
    return TxnOperation(rpc.RequestOp(request_range=request))


def is_read(do: TxnOperation) -> bool:
    """Whether it is a read and nothing else."""
    return bool(cast("Message", do).HasField("request_range"))


def range_request(do: TxnOperation, *, at: int) -> Message:
    """The message of a read by itself, at revision `at` unless it names one or `at` is 0."""
    request = rpc.RangeRequest()
    request.CopyFrom(cast("Message", do).request_range)
    request.revision = request.revision or at
    return request


def range_response(response: Message) -> RangeResponse:
    """The answer to a read by itself."""
    return RangeResponse(tuple(_entries(response.kvs)), more=bool(response.more))


def txn_request(
    compare: Sequence[Compare], success: Sequence[TxnOperation], failure: Sequence[TxnOperation]
) -> Message:
    """The message of a transaction."""
    return rpc.TxnRequest(compare=compare, success=success, failure=failure)


def txn_response(response: Message) -> TxnResponse:
    """The answer to a transaction."""
    return TxnResponse(
        succeeded=bool(response.succeeded),
        revision=int(response.header.revision),
        ranges=tuple(
            range_response(part.response_range) for part in response.responses if part.HasField("response_range")
        ),
    )


def watch_request(keys: KeyRange, start: int) -> Message:
    """Asks for every change in a range from revision `start` on, each with what was there before."""
    # In fragments: a batch is a thousand revisions, and one message of them could be of any size.
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
        refusal=str(response.cancel_reason or "no reason given") if response.canceled else "",
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
