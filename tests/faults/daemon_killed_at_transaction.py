"""A gpudockd that kills itself with SIGKILL before the store transaction with a given number.

It is for records that a daemon writes without an operation, when it starts; for operations see `instrumented_daemon`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from gpudock_server.app import PortWrappers, run
from gpudock_server.model.store_changes import StoreChange
from gpudock_server.ports import Store
from gpudock_server.settings.sources import load

from tests.faults.instrumented_daemon import DIE_AT


class KillingStore:
    """A store that kills the process before its `die_at`-th transaction."""

    def __init__(self, store: Store, die_at: int) -> None:
        self._store = store
        self._left = die_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def apply(self, changes: Sequence[StoreChange]) -> int:
        """See `Store.apply`."""
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        return await self._store.apply(changes)


def main() -> int:
    """Run the daemon; returns its exit code."""
    wrappers = PortWrappers(store=lambda store: KillingStore(store, int(os.environ[DIE_AT])))
    return run(load(sys.argv[1:]).settings, wrappers)


if __name__ == "__main__":
    sys.exit(main())
