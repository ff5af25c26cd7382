"""Leases for keys that expire: one lease (a bucket) for all keys written within an hour.

One lease per ended operation would be as many timers in etcd as there are operations in the retention time. The time to
live of a bucket is long enough for the last key that gets its lease.
"""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta

from gpudock_server.adapters.etcd.connection import EtcdConnection


class ExpiryBuckets:
    """Grants a lease per `width`. A key with the lease lives for at least `retention`."""

    def __init__(self, connection: EtcdConnection, retention: timedelta, width: timedelta) -> None:
        self._connection = connection
        self._width = width.total_seconds()
        # One width for the last key of the bucket, and one for a slow clock or call.
        self._ttl_seconds = math.ceil(retention.total_seconds() + 2 * self._width)
        self._lease = 0
        self._closes = 0.0
        self._granting = asyncio.Lock()

    async def lease(self) -> int:
        """The lease for a key that is written now. Raises CallFailed."""
        async with self._granting:
            now = asyncio.get_running_loop().time()
            if not self._lease or now >= self._closes:
                self._lease = await self._connection.grant(self._ttl_seconds)
                self._closes = now + self._width
            return self._lease

    def discard(self, lease: int) -> None:
        """Do not use `lease` again: etcd no longer has it."""
        if self._lease == lease:
            self._lease = 0
