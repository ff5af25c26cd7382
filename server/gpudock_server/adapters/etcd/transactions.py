"""All of a list of changes or none, and certainty about which of the two it was.

A call that brings no answer may have been done, may still be done, or may never be. What settles it is that everything
a transaction puts is read back: one key that has our bytes, in a version that is younger than our first try, shows
that all of it happened. Where nothing shows it, the transaction is tried again; its conditions no longer hold if the
earlier try is done late, and then the reading shows that. An etcd that runs full is another cause of doubt: it does a
transaction and says that it has no space.
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

# How etcd and grpc refuse what is too large for them.
COMPACTION_RUNNING = "history is being compacted to make room; try again with the same request_id"
_TOO_LARGE = ("request is too large", "too many operations", "larger than max")


class Transaction:
    """One list of changes on its way into the store, for at most `deadline`."""

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
        # Anything that this transaction does gets a higher revision than any that was seen before it.
        self._before = connection.revision
        self._outcome_unknown = False
        self._no_space: CallFailed | None = None
        _validate(self._compiled)

    async def run(self) -> int:
        """Do it; the version of what it put.

        Raises StoreConflict, StoreUnavailable, StoreFull, InvalidArgument (too large).
        """
        self._require_capacity()
        known = await self._read(
            compiled_change for compiled_change in self._compiled if compiled_change.condition.needs_read
        )
        while True:
            answer = await self._submit(known) if self._conditions_hold(known) else None
            if answer is not None and answer.succeeded:
                return answer.revision
            known = _by_key(answer) if answer else await self._read(self._compiled)
            if self._outcome_unknown:
                version = self._committed_version(known)
                if version:
                    return version
            self._raise_conflict(known)
            await self._wait_for_capacity()

    def _conditions_hold(self, known: dict[bytes, KeyValue]) -> bool:
        """Whether the conditions that were read first held; those that etcd checks alone are left to it."""
        return all(
            compiled_change.condition.holds(known.get(compiled_change.key))
            for compiled_change in self._compiled
            if compiled_change.condition.needs_read
        )

    async def _submit(self, known: dict[bytes, KeyValue]) -> TxnResponse | None:
        """Try it. None where there was no answer, or one that another try may change."""
        try:
            if any(compiled_change.needs_lease for compiled_change in self._compiled):
                self._lease = await self._expiry.lease()
            compares = [
                compiled_change.condition.compare(compiled_change.key, known.get(compiled_change.key))
                for compiled_change in self._compiled
            ]
            return await self._connection.txn(
                [compare for compare in compares if compare is not None],
                [
                    do
                    for compiled_change in self._compiled
                    for do in compiled_change.txn_operations(known.get(compiled_change.key), self._lease)
                ],
                [messages.get(compiled_change.key) for compiled_change in self._compiled],
                timeout=self._backoff.left,
            )
        except CallFailed as failure:
            # etcd says that it has no space of what it refuses, and of what it does last before it refuses.
            self._outcome_unknown |= failure.outcome_unknown or failure.no_space
            if failure.no_space:
                self._no_space = failure
            else:
                await self._wait_after(failure)
            return None

    async def _wait_for_capacity(self) -> None:
        """Where it was not done for want of room, return when it is time for another try. Raises StoreFull."""
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
        """Raises StoreFull for an operation that is not to begin now."""
        for compiled_change in self._compiled:
            if isinstance(compiled_change.change, PutOperation) and compiled_change.change.expect == 0:
                self._capacity.admit(compiled_change.change.operation.kind)

    async def _read(self, steps: Iterable[CompiledChange]) -> dict[bytes, KeyValue]:
        reads = [messages.get(compiled_change.key) for compiled_change in steps]
        while reads:
            try:
                return _by_key(await self._connection.txn(success=reads, timeout=self._backoff.left))
            except CallFailed as failure:
                await self._wait_after(failure)
        return {}

    async def _wait_after(self, failure: CallFailed) -> None:
        """Return when it is time for another try; raise where none can help."""
        if self._lease and failure.code == "NOT_FOUND" and "lease" in failure.detail:
            self._expiry.discard(self._lease)
        elif any(phrase in failure.detail for phrase in _TOO_LARGE):
            what = f"it takes more than etcd stores in one transaction ({failure.detail})"
            raise InvalidArgument((FieldViolation("spec", what),)) from None
        elif not failure.retryable:
            raise failure.to_store_error() from None
        if not await self._backoff.pause():
            raise failure.to_store_error() from None

    def _committed_version(self, known: dict[bytes, KeyValue]) -> int:
        """The version of what an earlier try of ours put; 0 where nothing shows that it did."""
        for compiled_change in self._compiled:
            entry = known.get(compiled_change.key)
            if entry is None or entry.value != compiled_change.value or entry.version <= self._before:
                continue
            if not (
                isinstance(compiled_change.condition, VersionIs) and compiled_change.condition.version == entry.version
            ):
                return entry.version
        return 0

    def _raise_conflict(self, known: dict[bytes, KeyValue]) -> None:
        for compiled_change in self._compiled:
            entry = known.get(compiled_change.key)
            if compiled_change.condition.holds(entry):
                continue
            if self._outcome_unknown and not any(each.value for each in self._compiled):
                raise StoreUnavailable("it did not say whether it took what was only to be deleted")
            raise StoreConflict(compiled_change.change, compiled_change.found(entry) if entry else None)


def _by_key(answer: TxnResponse) -> dict[bytes, KeyValue]:
    return {entry.key: entry for found in answer.ranges for entry in found.entries}


def _validate(steps: Sequence[CompiledChange]) -> None:
    if not steps:
        raise ValueError("a transaction needs a change")
    keys = [compiled_change.key for compiled_change in steps]
    if len(set(keys)) != len(keys):
        raise ValueError(f"two changes touch one key: {[compiled_change.change for compiled_change in steps]}")
    # What a deletion takes along is an operation of etcd's each.
    operations = sum(compiled_change.operations for compiled_change in steps)
    if operations > MAX_TXN_OPERATIONS:
        what = f"it takes {operations} changes in one transaction, and etcd takes {MAX_TXN_OPERATIONS}"
        raise InvalidArgument((FieldViolation("spec", what),))
