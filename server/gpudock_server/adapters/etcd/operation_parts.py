"""Splits an operation into keys: the record, which every step writes, and its large parts, which are written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from pydantic import Field

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.keys import Keys
from gpudock_server.adapters.etcd.messages import KeyValue, RangeResponse
from gpudock_server.adapters.etcd.values import decode, encode
from gpudock_server.model.operation import Operation, Result
from gpudock_server.model.record import JsonObject, Record
from gpudock_server.model.store_changes import PutOperation, StoreChange
from gpudock_server.ports import Versioned

# The number of reads for one operation.
READS_OF_ONE = 3

# A result is put with the lease of its commit. If the operation takes longer than this to end, the result is put again,
# so that it is kept as long after the end as the record.
_LEASE_SLACK = timedelta(hours=1)
# For how many operations it is remembered which parts are stored. A forgotten part is stored once more.
_REMEMBERED = 10_000


class OperationArguments(Record):
    """The arguments of an operation."""

    arguments: JsonObject = Field(default_factory=dict)


class OperationResult(Record):
    """The result of an operation."""

    result: Result


@dataclass(frozen=True, slots=True)
class PartPut:
    """A part to put; with `expires`, it gets the lease of ended operations."""

    key: bytes
    value: bytes
    expires: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """What is written together with a record: parts to put and keys to delete."""

    puts: tuple[PartPut, ...] = ()
    deletes: tuple[bytes, ...] = ()


NO_PARTS = Parts()


@dataclass(eq=False)
class OperationParts:
    """Splits and joins operations; remembers which parts of an operation are stored.

    `ended` (operations) and `result_bytes` count what was stored since OperationTrimmer last set them to 0.
    """

    keys: Keys
    ended: int = 0
    result_bytes: int = 0
    _arguments: set[str] = field(default_factory=set)
    _results: set[str] = field(default_factory=set)

    def record(self, operation: Operation) -> bytes:
        """The value of the operation's key: the record without its parts."""
        return encode(operation.changed(arguments={}, result=None))

    def companions(self, operation: Operation) -> Parts:
        """The parts to put and keys to delete together with the record."""
        puts: list[PartPut] = []
        if operation.arguments and not operation.state.ended and operation.id not in self._arguments:
            value = encode(OperationArguments(arguments=operation.arguments))
            puts.append(PartPut(self.keys.arguments(operation.id), value, expires=False))
        if operation.result is not None and (operation.id not in self._results or _took_long(operation)):
            value = encode(OperationResult(result=operation.result))
            puts.append(PartPut(self.keys.result(operation.id, len(value)), value, expires=True))
        return Parts(tuple(puts), (self.keys.arguments(operation.id),) if operation.state.ended else ())

    def stored(self, changes: Sequence[StoreChange]) -> None:
        """Note that these changes are stored."""
        for change in changes:
            if isinstance(change, PutOperation):
                self._stored(change.operation)

    def _stored(self, operation: Operation) -> None:
        if operation.result is not None and operation.id not in self._results:
            self.result_bytes += len(encode(OperationResult(result=operation.result)))
        if operation.state.ended:
            self.ended += 1
            self._arguments.discard(operation.id)
            self._results.discard(operation.id)
        else:
            self._remember(operation.id, arguments=bool(operation.arguments), result=operation.result is not None)

    def _remember(self, operation_id: str, *, arguments: bool, result: bool) -> None:
        for ids, stored in ((self._arguments, arguments), (self._results, result)):
            if len(ids) >= _REMEMBERED:
                ids.clear()
            if stored:
                ids.add(operation_id)

    def reads(self, operation_id: str) -> tuple[messages.TxnOperation, messages.TxnOperation, messages.TxnOperation]:
        """The reads for an operation, whose responses `joined` takes."""
        return (
            messages.get(self.keys.operation(operation_id)),
            messages.get(self.keys.arguments(operation_id)),
            messages.get_range(self.keys.results_of(operation_id), limit=1),
        )

    def joined(self, found: Sequence[RangeResponse]) -> Versioned[Operation] | None:
        """The operation in the responses to `reads`; None if there is none. Raises RecordUnreadable."""
        record, arguments, result = (answer.only for answer in found)
        if record is None:
            return None
        operation = decode(Operation, record.key, record.value)
        if not operation.state.ended:
            self._remember(operation.id, arguments=arguments is not None, result=result is not None)
        return Versioned(_joined(operation, arguments, result), record.version)


def _joined(operation: Operation, arguments: KeyValue | None, result: KeyValue | None) -> Operation:
    # A record written by an older daemon contains its parts.
    if arguments is not None:
        part = decode(OperationArguments, arguments.key, arguments.value)
        operation = operation.changed(arguments=part.arguments)
    if result is not None:
        operation = operation.changed(result=decode(OperationResult, result.key, result.value).result)
    return operation


def _took_long(operation: Operation) -> bool:
    """Whether it may have ended so long after its commit that the lease of its result ends too early."""
    return operation.end_time is not None and operation.end_time - operation.create_time > _LEASE_SLACK
