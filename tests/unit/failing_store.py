"""A store in memory whose transactions a test can make fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from gpudock_server.model.node import NodeRecord
from gpudock_server.model.store_changes import StoreChange
from typing_extensions import override

from tests.rpc.fakes import LONG_AGO
from tests.rpc.memory_store import MemoryStore


class FailingStore(MemoryStore):
    """A MemoryStore with failures and with records of other nodes.

    Each transaction takes the next of `failures` and raises it; None lets the transaction through. `before_apply` is
    called with the changes of every transaction. `node_records` are the heartbeats of all nodes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: deque[Exception | None] = deque()
        self.before_apply: Callable[[Sequence[StoreChange]], None] = lambda _: None
        self.node_records: list[NodeRecord] = []

    @override
    async def apply(self, changes: Sequence[StoreChange]) -> int:
        self.before_apply(changes)
        failure = self.failures.popleft() if self.failures else None
        if failure is not None:
            raise failure
        return await super().apply(changes)

    @override
    async def nodes(self) -> tuple[NodeRecord, ...]:
        return tuple(self.node_records)


def node_record(node: str, address: str) -> NodeRecord:
    """Return the heartbeat of a daemon."""
    return NodeRecord(
        node=node,
        host="host1",
        address=address,
        version="1",
        engine_id="E",
        boot_id="b",
        pid=1,
        start_ticks=1,
        start_time=LONG_AGO,
    )
