"""Whether the store has space for writes, as the maintenance task last found, and requests for more space."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from gpudock_server.errors import StoreFull
from gpudock_server.model.operation import OperationKind

# Operations that free space or need hardly any: they may begin when no others may.
_FREEING = frozenset(
    {OperationKind.DELETE, OperationKind.DELETE_REVISION, OperationKind.DELETE_VOLUME, OperationKind.STOP}
)


class StoreCapacity:
    """Shared between StoreMaintenance, which sets it, and writers, which check it.

    `can_reclaim`: this daemon's maintenance can free space. `registered`: the store has this daemon's node record.
    `reserved` says why only operations that free space may begin, `full` why nothing that needs space can be written;
    both are empty if that is not so.
    """

    def __init__(self) -> None:
        self.can_reclaim = False
        self.registered = True
        self.reserved = ""
        self.full = ""
        self.space_requested = asyncio.Event()
        self._checked = asyncio.Event()

    def request_space(self) -> bool:
        """Report that a write failed for lack of space; returns whether a retry may soon succeed."""
        self.space_requested.set()
        return self.can_reclaim and not self.full

    async def wait_for_check(self, *, within: float) -> None:
        """Wait for the next check of the store by StoreMaintenance, for at most `within` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._checked.wait(), within)

    def mark_checked(self) -> None:
        """Wake the tasks that wait for a check."""
        self._checked.set()
        self._checked = asyncio.Event()

    def admit(self, kind: OperationKind) -> None:
        """Check that an operation of this kind may begin. Raises StoreFull."""
        if not self.registered:
            # Two daemons may wait to register the same node: only the registered one may work for it.
            raise StoreFull("it had no space to register this node; try again, there may be space now")
        if self.reserved and kind not in _FREEING:
            raise StoreFull(self.reserved)

    def mark_written(self) -> None:
        """Report a write: if space is short, it may have freed some."""
        if self.reserved:
            self.space_requested.set()
