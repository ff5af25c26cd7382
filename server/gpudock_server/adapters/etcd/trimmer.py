"""Limits the space of ended operations: the number of records, and the bytes of results.

The ids of operations sort by time, newest first, so everything after a key is older.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import structlog

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.connection import EtcdConnection
from gpudock_server.adapters.etcd.keys import KeyRange
from gpudock_server.adapters.etcd.messages import KeyValue
from gpudock_server.adapters.etcd.operation_parts import OperationParts
from gpudock_server.adapters.etcd.values import decode
from gpudock_server.errors import RecordUnreadable
from gpudock_server.model.operation import Operation

DEFAULT_OPERATIONS = 10_000
DEFAULT_RESULT_BYTES = 64 << 20
# With a quota the limits are at most these parts of it.
_BYTES_OF_QUOTA_PER_OPERATION = 32 << 10
_RESULTS_PART_OF_QUOTA = 16

_RETRY_FOR = timedelta(seconds=10)
_PAGE = 1000
_RECORDS_PAGE = 100
# The part (1/8) of a limit by which it may be exceeded before the next trim.
_SLACK = 8

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class OperationTrimmer:
    """Keeps the newest `operations` records and the newest `result_bytes` of results."""

    def __init__(
        self,
        connection: EtcdConnection,
        parts: OperationParts,
        *,
        operations: int = DEFAULT_OPERATIONS,
        result_bytes: int = DEFAULT_RESULT_BYTES,
    ) -> None:
        self._connection = connection
        self._parts = parts
        self._operations = operations
        self._result_bytes = result_bytes
        # A killed daemon may have left something to trim.
        self._first_trim = True

    def limit_to(self, quota_bytes: int) -> None:
        """Lower the limits to what fits into a database of this size."""
        self._operations = min(self._operations, quota_bytes // _BYTES_OF_QUOTA_PER_OPERATION)
        self._result_bytes = min(self._result_bytes, quota_bytes // _RESULTS_PART_OF_QUOTA)

    @property
    def due(self) -> bool:
        """Whether enough was written since the last trim."""
        parts = self._parts
        return (
            self._first_trim
            or parts.ended > self._operations // _SLACK
            or parts.result_bytes > self._result_bytes // _SLACK
        )

    async def trim(self) -> None:
        """Remove what exceeds the limits. Raises CallFailed."""
        self._first_trim = False
        self._parts.ended = self._parts.result_bytes = 0
        await self._trim_results()
        await self._trim_records()

    async def _trim_results(self) -> None:
        keys, total = self._parts.keys, 0
        async for entry in self._all(keys.results(), _PAGE, keys_only=True):
            total += int(keys.last_segment(entry.key))
            if total > self._result_bytes:
                older = KeyRange(entry.key, keys.results().end)
                log.info("oldest operation results deleted", kept_bytes=self._result_bytes)
                await self._connection.delete(older)
                return

    async def _trim_records(self) -> None:
        """Remove the oldest records and their results; operations that have not ended stay."""
        keys, last_kept, count = self._parts.keys, b"", 0
        async for entry in self._all(keys.operations(), _PAGE, keys_only=True):
            count += 1
            if count == self._operations:
                last_kept = entry.key
        if count <= self._operations:
            return
        log.info("oldest operation records deleted", kept=self._operations)
        async for entry in self._all(keys.operations().after(last_kept), _RECORDS_PAGE, keys_only=False):
            if _has_ended(entry):
                # No condition: an ended operation is not written again.
                await self._connection.delete(keys.results_of(keys.last_segment(entry.key)))
                await self._connection.delete(KeyRange(entry.key, entry.key + b"\0"))

    async def _all(self, keys: KeyRange, page: int, *, keys_only: bool) -> AsyncIterator[KeyValue]:
        more = True
        while more:
            read = messages.get_range(keys, limit=page, keys_only=keys_only)
            answer = (await self._connection.read(read, retry_for=_RETRY_FOR)).ranges[0]
            for entry in answer.entries:
                yield entry
            more = answer.more
            if answer.entries:
                keys = keys.after(answer.entries[-1].key)


def _has_ended(entry: KeyValue) -> bool:
    try:
        return decode(Operation, entry.key, entry.value).state.ended
    except RecordUnreadable:
        return False
