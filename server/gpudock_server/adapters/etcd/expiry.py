"""Leases for what expires: one for all that ended within the same hour, and not one for each.

A lease for every ended operation would be as many timers in etcd as there were operations in a day. A bucket is a
lease that is given to everything that ends while the bucket is open; its time is long enough for the last of them.
"""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta

from gpudock_server.adapters.etcd.connection import EtcdConnection


class ExpiryBuckets:
    """Hands out the lease of the bucket that is open. What it is put on lives for `retention` at least."""

    def __init__(self, connection: EtcdConnection, retention: timedelta, width: timedelta) -> None:
        self._connection = connection
        self._width = width.total_seconds()
        # One width for what is put on it last, and one so that a slow clock or call does not eat into the retention.
        self._ttl_seconds = math.ceil(retention.total_seconds() + 2 * self._width)
        self._lease = 0
        self._closes = 0.0
        self._granting = asyncio.Lock()

    async def lease(self) -> int:
        """The lease to put things on now. Raises CallFailed."""
        async with self._granting:
            now = asyncio.get_running_loop().time()
            if not self._lease or now >= self._closes:
                self._lease = await self._connection.grant(self._ttl_seconds)
                self._closes = now + self._width
            return self._lease

    def discard(self, lease: int) -> None:
        """Never hand out `lease` again: etcd does not know it any more."""
        if self._lease == lease:
            self._lease = 0
