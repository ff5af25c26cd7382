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

from gpudock_server.adapters.etcd import wire
from gpudock_server.adapters.etcd.conditions import VersionIs
from gpudock_server.adapters.etcd.connection import CallFailed, EtcdConnection, Pauses
from gpudock_server.adapters.etcd.expiry import ExpiryBuckets
from gpudock_server.adapters.etcd.keys import Keys
from gpudock_server.adapters.etcd.operation_parts import OperationParts
from gpudock_server.adapters.etcd.room import Room
from gpudock_server.adapters.etcd.steps import Step, step_of
from gpudock_server.adapters.etcd.wire import MAX_TXN_OPERATIONS, Entry, TxnAnswer
from gpudock_server.errors import FieldViolation, InvalidArgument, StoreFull, StoreUnavailable
from gpudock_server.model.changes import Change, PutOperation
from gpudock_server.ports import StoreConflict

# How etcd and grpc refuse what is too large for them.
NO_ROOM_YET = "history is being compacted to make room; try again with the same request_id"
_TOO_MUCH = ("request is too large", "too many operations", "larger than max")


class Transaction:
    """One list of changes on its way into the store, for at most `deadline`."""

    def __init__(
        self,
        connection: EtcdConnection,
        keys: Keys,
        expiry: ExpiryBuckets,
        changes: Sequence[Change],
        deadline: timedelta,
        *,
        operations: OperationParts,
        room: Room,
    ) -> None:
        self._connection = connection
        self._room = room
        self._expiry = expiry
        self._steps = [step_of(change, keys, operations) for change in changes]
        self._lease = 0
        self._pauses = Pauses(deadline)
        # Anything that this transaction does gets a higher revision than any that was seen before it.
        self._before = connection.revision
        self._in_doubt = False
        self._no_space: CallFailed | None = None
        _refuse_nonsense(self._steps)

    async def run(self) -> int:
        """Do it; the version of what it put.

        Raises StoreConflict, StoreUnavailable, StoreFull, InvalidArgument (too large).
        """
        self._admit()
        known = await self._read(step for step in self._steps if step.condition.reads_first)
        while True:
            answer = await self._commit(known) if self._can_hold(known) else None
            if answer is not None and answer.succeeded:
                return answer.revision
            known = _by_key(answer) if answer else await self._read(self._steps)
            if self._in_doubt:
                version = self._version_put(known)
                if version:
                    return version
            self._refuse_conflict(known)
            await self._wait_for_room()

    def _can_hold(self, known: dict[bytes, Entry]) -> bool:
        """Whether the conditions that were read first held; those that etcd checks alone are left to it."""
        return all(step.condition.holds(known.get(step.key)) for step in self._steps if step.condition.reads_first)

    async def _commit(self, known: dict[bytes, Entry]) -> TxnAnswer | None:
        """Try it. None where there was no answer, or one that another try may change."""
        try:
            if any(step.needs_lease for step in self._steps):
                self._lease = await self._expiry.lease()
            compares = [step.condition.compare(step.key, known.get(step.key)) for step in self._steps]
            return await self._connection.txn(
                [compare for compare in compares if compare is not None],
                [do for step in self._steps for do in step.does(known.get(step.key), self._lease)],
                [wire.get(step.key) for step in self._steps],
                timeout=self._pauses.left,
            )
        except CallFailed as failure:
            # etcd says that it has no space of what it refuses, and of what it does last before it refuses.
            self._in_doubt |= failure.unanswered or failure.no_space
            if failure.no_space:
                self._no_space = failure
            else:
                await self._wait_after(failure)
            return None

    async def _wait_for_room(self) -> None:
        """Where it was not done for want of room, return when it is time for another try. Raises StoreFull."""
        failure, self._no_space = self._no_space, None
        if failure is None:
            return
        if self._room.wish():
            await self._room.looked_at(within=self._pauses.left)
            self._admit()
            if await self._pauses.pause():
                return
        raise StoreFull(self._room.full or NO_ROOM_YET) if self._room.mends else failure.for_core()

    def _admit(self) -> None:
        """Raises StoreFull for an operation that is not to begin now."""
        for step in self._steps:
            if isinstance(step.change, PutOperation) and step.change.expect == 0:
                self._room.admit(step.change.operation.kind)

    async def _read(self, steps: Iterable[Step]) -> dict[bytes, Entry]:
        reads = [wire.get(step.key) for step in steps]
        while reads:
            try:
                return _by_key(await self._connection.txn(success=reads, timeout=self._pauses.left))
            except CallFailed as failure:
                await self._wait_after(failure)
        return {}

    async def _wait_after(self, failure: CallFailed) -> None:
        """Return when it is time for another try; raise where none can help."""
        if self._lease and failure.code == "NOT_FOUND" and "lease" in failure.detail:
            self._expiry.lost(self._lease)
        elif any(phrase in failure.detail for phrase in _TOO_MUCH):
            what = f"it takes more than etcd stores in one transaction ({failure.detail})"
            raise InvalidArgument((FieldViolation("spec", what),)) from None
        elif not failure.passing:
            raise failure.for_core() from None
        if not await self._pauses.pause():
            raise failure.for_core() from None

    def _version_put(self, known: dict[bytes, Entry]) -> int:
        """The version of what an earlier try of ours put; 0 where nothing shows that it did."""
        for step in self._steps:
            entry = known.get(step.key)
            if entry is None or entry.value != step.value or entry.version <= self._before:
                continue
            if not (isinstance(step.condition, VersionIs) and step.condition.version == entry.version):
                return entry.version
        return 0

    def _refuse_conflict(self, known: dict[bytes, Entry]) -> None:
        for step in self._steps:
            entry = known.get(step.key)
            if step.condition.holds(entry):
                continue
            if self._in_doubt and not any(each.value for each in self._steps):
                raise StoreUnavailable("it did not say whether it took what was only to be deleted")
            raise StoreConflict(step.change, step.found(entry) if entry else None)


def _by_key(answer: TxnAnswer) -> dict[bytes, Entry]:
    return {entry.key: entry for found in answer.ranges for entry in found.entries}


def _refuse_nonsense(steps: Sequence[Step]) -> None:
    if not steps:
        raise ValueError("a transaction needs a change")
    keys = [step.key for step in steps]
    if len(set(keys)) != len(keys):
        raise ValueError(f"two changes touch one key: {[step.change for step in steps]}")
    # What a deletion takes along is an operation of etcd's each.
    operations = sum(step.operations for step in steps)
    if operations > MAX_TXN_OPERATIONS:
        what = f"it takes {operations} changes in one transaction, and etcd takes {MAX_TXN_OPERATIONS}"
        raise InvalidArgument((FieldViolation("spec", what),))
