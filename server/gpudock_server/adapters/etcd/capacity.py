"""Whether the store has room, as the keeper last saw it, and the wish for more."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from gpudock_server.errors import StoreFull
from gpudock_server.model.operation import OperationKind

# Operations that give room back, or hardly take any: they are let in where nothing else is.
_FREEING = frozenset(
    {OperationKind.DELETE, OperationKind.DELETE_REVISION, OperationKind.DELETE_VOLUME, OperationKind.STOP}
)


class StoreCapacity:
    """Shared by the keeper, who fills it in, and by those who write.

    `can_reclaim`: a keeper of this daemon can make room. `registered`: the store knows of this daemon. `reserved` says
    why only operations that give room back may begin, `full` why nothing that needs room can be written; both are empty
    where that is not so.
    """

    def __init__(self) -> None:
        self.can_reclaim = False
        self.registered = True
        self.reserved = ""
        self.full = ""
        self.space_requested = asyncio.Event()
        self._checked = asyncio.Event()

    def request_space(self) -> bool:
        """Something was refused for want of room; whether it is worth while to try again soon."""
        self.space_requested.set()
        return self.can_reclaim and not self.full

    async def wait_for_check(self, *, within: float) -> None:
        """Return when the keeper has looked at the store once more, or so many seconds have passed."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._checked.wait(), within)

    def mark_checked(self) -> None:
        """The keeper has looked, and noted what it found."""
        self._checked.set()
        self._checked = asyncio.Event()

    def admit(self, kind: OperationKind) -> None:
        """An operation is to begin. Raises StoreFull."""
        if not self.registered:
            # Two daemons may wait for one node's name: neither works for the node before it has the name.
            raise StoreFull("it had no room for the name of this node; there may be some now, so try again")
        if self.reserved and kind not in _FREEING:
            raise StoreFull(self.reserved)

    def mark_written(self) -> None:
        """Something was written: where room is short, it may have been a deletion."""
        if self.reserved:
            self.space_requested.set()
