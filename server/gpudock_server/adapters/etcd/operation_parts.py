"""An operation in its keys: the record that every step writes, and beside it what is large and is written once."""

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

# How many keys an operation takes at most in a read.
READS_OF_ONE = 3

# A result is put with the lease of its commit. Where the operation then takes longer than this to end, the result is
# put again, so that it is kept as long after the end as the record is.
_LEASE_SLACK = timedelta(hours=1)
# Of so many operations is remembered which parts are stored. A part that was forgotten is stored once more.
_REMEMBERED = 10_000


class OperationArguments(Record):
    """What an operation was begun with."""

    arguments: JsonObject = Field(default_factory=dict)


class OperationResult(Record):
    """What an operation left."""

    result: Result


@dataclass(frozen=True, slots=True)
class PartPut:
    """A part to put. `expires`: with the lease of what has ended."""

    key: bytes
    value: bytes
    expires: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """What belongs beside a record that is put: parts to put, and keys to delete."""

    puts: tuple[PartPut, ...] = ()
    deletes: tuple[bytes, ...] = ()


NO_PARTS = Parts()


@dataclass(eq=False)
class OperationParts:
    """Takes operations apart and joins them again; remembers which parts of which operation the store has.

    `ended` and `result_bytes` count what was stored since the trimmer last set them to 0.
    """

    keys: Keys
    ended: int = 0
    result_bytes: int = 0
    _arguments: set[str] = field(default_factory=set)
    _results: set[str] = field(default_factory=set)

    def record(self, operation: Operation) -> bytes:
        """The value of the operation's own key."""
        return encode(operation.changed(arguments={}, result=None))

    def companions(self, operation: Operation) -> Parts:
        """What has to be put and deleted together with the record."""
        puts: list[PartPut] = []
        if operation.arguments and not operation.state.ended and operation.id not in self._arguments:
            value = encode(OperationArguments(arguments=operation.arguments))
            puts.append(PartPut(self.keys.arguments(operation.id), value, expires=False))
        if operation.result is not None and (operation.id not in self._results or _took_long(operation)):
            value = encode(OperationResult(result=operation.result))
            puts.append(PartPut(self.keys.result(operation.id, len(value)), value, expires=True))
        return Parts(tuple(puts), (self.keys.arguments(operation.id),) if operation.state.ended else ())

    def stored(self, changes: Sequence[StoreChange]) -> None:
        """These changes are in the store now."""
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
        for known, there in ((self._arguments, arguments), (self._results, result)):
            if len(known) >= _REMEMBERED:
                known.clear()
            if there:
                known.add(operation_id)

    def reads(self, operation_id: str) -> tuple[messages.TxnOperation, messages.TxnOperation, messages.TxnOperation]:
        """What reads all of an operation; `joined` takes the answers."""
        return (
            messages.get(self.keys.operation(operation_id)),
            messages.get(self.keys.arguments(operation_id)),
            messages.get_range(self.keys.results_of(operation_id), limit=1),
        )

    def joined(self, found: Sequence[RangeResponse]) -> Versioned[Operation] | None:
        """The operation that `reads` found. Raises RecordUnreadable."""
        record, arguments, result = (answer.only for answer in found)
        if record is None:
            return None
        operation = decode(Operation, record.key, record.value)
        if not operation.state.ended:
            self._remember(operation.id, arguments=arguments is not None, result=result is not None)
        return Versioned(_joined(operation, arguments, result), record.version)


def _joined(operation: Operation, arguments: KeyValue | None, result: KeyValue | None) -> Operation:
    # What an older daemon wrote holds its parts itself.
    if arguments is not None:
        part = decode(OperationArguments, arguments.key, arguments.value)
        operation = operation.changed(arguments=part.arguments)
    if result is not None:
        operation = operation.changed(result=decode(OperationResult, result.key, result.value).result)
    return operation


def _took_long(operation: Operation) -> bool:
    """Whether it ended perhaps so long after its commit that the lease of its result would end too early."""
    return operation.end_time is not None and operation.end_time - operation.create_time > _LEASE_SLACK
