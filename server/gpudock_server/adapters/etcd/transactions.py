"""Applies a list of changes completely or not at all, and finds out which of the two happened.

A call without an answer may have been done, may still be done, or may never be done. To find out, the keys of the
transaction are read back: a key that has our value, in a version newer than our first try, shows that everything was
applied. Otherwise the transaction is tried again; if the earlier try is done late, its conditions no longer hold, and
the next read shows that. The outcome is also unknown when etcd runs full: it may apply a transaction and report that it
has no space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.capacity import StoreCapacity
from gpudock_server.adapters.etcd.compiled_changes import CompiledChange, compile_change
from gpudock_server.adapters.etcd.conditions import VersionIs
from gpudock_server.adapters.etcd.connection import Backoff, CallFailed, EtcdConnection
from gpudock_server.adapters.etcd.expiry import ExpiryBuckets
from gpudock_server.adapters.etcd.keys import Keys
from gpudock_server.adapters.etcd.messages import MAX_TXN_OPERATIONS, KeyValue, TxnResponse
from gpudock_server.adapters.etcd.operation_parts import OperationParts
from gpudock_server.errors import FieldViolation, InvalidArgument, StoreFull, StoreUnavailable
from gpudock_server.model.store_changes import PutOperation, StoreChange
from gpudock_server.ports import StoreConflict

COMPACTION_RUNNING = "it is being compacted to free space; try again with the same request_id"
# How etcd and grpc reject a request that is too large.
_TOO_LARGE = ("request is too large", "too many operations", "larger than max")


class Transaction:
    """One list of changes, tried for at most `deadline`."""

    def __init__(
        self,
        connection: EtcdConnection,
        keys: Keys,
        expiry: ExpiryBuckets,
        changes: Sequence[StoreChange],
        deadline: timedelta,
        *,
        operations: OperationParts,
        capacity: StoreCapacity,
    ) -> None:
        self._connection = connection
        self._capacity = capacity
        self._expiry = expiry
        self._compiled = [compile_change(change, keys, operations) for change in changes]
        self._lease = 0
        self._backoff = Backoff(deadline)
        # Every key that this transaction writes gets a revision higher than all revisions known before it.
        self._before = connection.revision
        self._outcome_unknown = False
        self._no_space: CallFailed | None = None
        _validate(self._compiled)

    async def run(self) -> int:
        """Apply the changes; returns the version of the keys put.

        Raises StoreConflict, StoreUnavailable, StoreFull, InvalidArgument (too large).
        """
        self._require_capacity()
        entries = await self._read(
            compiled_change for compiled_change in self._compiled if compiled_change.condition.needs_read
        )
        while True:
            answer = await self._submit(entries) if self._conditions_hold(entries) else None
            if answer is not None and answer.succeeded:
                return answer.revision
            entries = _by_key(answer) if answer else await self._read(self._compiled)
            if self._outcome_unknown:
                version = self._committed_version(entries)
                if version:
                    return version
            self._raise_conflict(entries)
            await self._wait_for_capacity()

    def _conditions_hold(self, entries: dict[bytes, KeyValue]) -> bool:
        """Whether the conditions that need a read hold; etcd checks the others."""
        return all(
            compiled_change.condition.holds(entries.get(compiled_change.key))
            for compiled_change in self._compiled
            if compiled_change.condition.needs_read
        )

    async def _submit(self, entries: dict[bytes, KeyValue]) -> TxnResponse | None:
        """Try the transaction. None if there was no answer, or an error for which another try may help."""
        try:
            if any(compiled_change.needs_lease for compiled_change in self._compiled):
                self._lease = await self._expiry.lease()
            compares = [
                compiled_change.condition.compare(compiled_change.key, entries.get(compiled_change.key))
                for compiled_change in self._compiled
            ]
            return await self._connection.txn(
                [compare for compare in compares if compare is not None],
                [
                    operation
                    for compiled_change in self._compiled
                    for operation in compiled_change.txn_operations(entries.get(compiled_change.key), self._lease)
                ],
                [messages.get(compiled_change.key) for compiled_change in self._compiled],
                timeout=self._backoff.left,
            )
        except CallFailed as failure:
            # With "no space" etcd may have applied the transaction: it reports that for the last one before it is full.
            self._outcome_unknown |= failure.outcome_unknown or failure.no_space
            if failure.no_space:
                self._no_space = failure
            else:
                await self._wait_after(failure)
            return None

    async def _wait_for_capacity(self) -> None:
        """After a try that failed for lack of space, wait until it is time for the next. Raises StoreFull."""
        failure, self._no_space = self._no_space, None
        if failure is None:
            return
        if self._capacity.request_space():
            await self._capacity.wait_for_check(within=self._backoff.left)
            self._require_capacity()
            if await self._backoff.pause():
                return
        raise (
            StoreFull(self._capacity.full or COMPACTION_RUNNING)
            if self._capacity.can_reclaim
            else failure.to_store_error()
        )

    def _require_capacity(self) -> None:
        """Raises StoreFull if the changes begin an operation that may not begin now."""
        for compiled_change in self._compiled:
            if isinstance(compiled_change.change, PutOperation) and compiled_change.change.expect == 0:
                self._capacity.admit(compiled_change.change.operation.kind)

    async def _read(self, changes: Iterable[CompiledChange]) -> dict[bytes, KeyValue]:
        reads = [messages.get(compiled_change.key) for compiled_change in changes]
        while reads:
            try:
                return _by_key(await self._connection.txn(success=reads, timeout=self._backoff.left))
            except CallFailed as failure:
                await self._wait_after(failure)
        return {}

    async def _wait_after(self, failure: CallFailed) -> None:
        """Wait until it is time for the next try. Raises if no other try can help."""
        if self._lease and failure.code == "NOT_FOUND" and "lease" in failure.detail:
            self._expiry.discard(self._lease)
        elif any(phrase in failure.detail for phrase in _TOO_LARGE):
            description = f"too large for one etcd transaction ({failure.detail})"
            raise InvalidArgument((FieldViolation("spec", description),)) from None
        elif not failure.retryable:
            raise failure.to_store_error() from None
        if not await self._backoff.pause():
            raise failure.to_store_error() from None

    def _committed_version(self, entries: dict[bytes, KeyValue]) -> int:
        """The version of the keys that an earlier try put; 0 if nothing shows that it was applied."""
        for compiled_change in self._compiled:
            entry = entries.get(compiled_change.key)
            if entry is None or entry.value != compiled_change.value or entry.version <= self._before:
                continue
            if not (
                isinstance(compiled_change.condition, VersionIs) and compiled_change.condition.version == entry.version
            ):
                return entry.version
        return 0

    def _raise_conflict(self, entries: dict[bytes, KeyValue]) -> None:
        for compiled_change in self._compiled:
            entry = entries.get(compiled_change.key)
            if compiled_change.condition.holds(entry):
                continue
            if self._outcome_unknown and not any(each.value for each in self._compiled):
                raise StoreUnavailable("the outcome of a delete is unknown")
            raise StoreConflict(compiled_change.change, compiled_change.found(entry) if entry else None)


def _by_key(answer: TxnResponse) -> dict[bytes, KeyValue]:
    return {entry.key: entry for found in answer.ranges for entry in found.entries}


def _validate(changes: Sequence[CompiledChange]) -> None:
    if not changes:
        raise ValueError("a transaction needs at least one change")
    keys = [compiled_change.key for compiled_change in changes]
    if len(set(keys)) != len(keys):
        raise ValueError(f"two changes use the same key: {[compiled_change.change for compiled_change in changes]}")
    operations = sum(compiled_change.operations for compiled_change in changes)
    if operations > MAX_TXN_OPERATIONS:
        description = f"needs {operations} etcd operations in one transaction; the limit is {MAX_TXN_OPERATIONS}"
        raise InvalidArgument((FieldViolation("spec", description),))
