"""Keeps the store from filling: bounds history, compacts and defragments an etcd of this daemon's own.

A cluster is somebody else's: there it only notices that it is full. An etcd of our own is given a quota and a reserve
on top. History is compacted as it grows, by size, besides etcd's own compaction by time; a file that is mostly free is
defragmented; and an alarm is taken back once there is room. Where the data alone reach the quota, only what gives room
back may begin, and has the reserve for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.capacity import StoreCapacity
from gpudock_server.adapters.etcd.connection import CLUSTER_IS_FULL, CallFailed, EtcdConnection, MemberStatus
from gpudock_server.adapters.etcd.trimmer import OperationTrimmer
from gpudock_server.sizes import Rounding, size_text

CHECK_SECONDS = 10.0

# Parts of the quota. History is compacted when it has grown by this much,
_COMPACT_FRACTION = 8
# or by this much where more than half of the quota is in use.
_COMPACT_FRACTION_WHEN_HALF = 32
# A file is defragmented when this much of it is free, and that is at least as much as is in use,
_DEFRAGMENT_FRACTION = 16
# or the file is as large as this many 16ths of the quota; when it is full, in any case where so much is free.
_LARGE_16THS = 14
_DEFRAGMENT_FRACTION_WHEN_FULL = 64
# Etcd counts pages that it has freed as free two commits later, and commits what was put every 0.1 s.
_BACKEND_COMMITS = 2
_BACKEND_COMMIT_SECONDS = 0.15

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def hard_quota(quota_bytes: int) -> int:
    """What etcd itself is told: the quota, and a reserve for operations that give room back or must end."""
    return quota_bytes + max(quota_bytes // 4, 4 << 20)


class StoreMaintenance:
    """Looks at the store every few seconds, and whenever something found no room."""

    def __init__(
        self,
        connection: EtcdConnection,
        capacity: StoreCapacity,
        trimmer: OperationTrimmer,
        marker_key: bytes,
        *,
        quota_bytes: int = 0,
    ) -> None:
        """`quota_bytes` is that of an etcd of our own; 0 is a cluster, which is not touched."""
        self._connection = connection
        self._capacity = capacity
        self._trimmer = trimmer
        self._marker_key = marker_key
        self._quota = quota_bytes
        capacity.can_reclaim = bool(quota_bytes)
        if quota_bytes:
            trimmer.limit_to(quota_bytes)
        # What was in use after the last compaction, up to where that went, and what the keeper itself put after it.
        self._floor = 0
        self._compacted = 0
        self._own_puts = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make room where there is none, then go on looking. Raises CallFailed."""
        await self._check()
        self._task = asyncio.create_task(self._run(), name="keeper of the store")

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._capacity.space_requested.wait(), CHECK_SECONDS)
            try:
                await self._check()
            except CallFailed as failure:
                log.warning("the store could not be looked after; it is tried again", reason=str(failure))
                await asyncio.sleep(1)
            except Exception:
                # A defect: without a keeper the store would fill.
                log.exception("the store could not be looked after")
                await asyncio.sleep(CHECK_SECONDS)

    async def _check(self) -> None:
        space_requested = self._capacity.space_requested.is_set()
        self._capacity.space_requested.clear()
        status = await self._connection.status()
        if self._trimmer.due and not status.no_space:
            await self._trimmer.trim()
        if self._quota:
            await self._reclaim(status, space_requested=space_requested)
        else:
            self._publish(CLUSTER_IS_FULL if status.no_space else "", reserved="")

    async def _reclaim(self, status: MemberStatus, *, space_requested: bool) -> None:
        # Deletions by others, or of a lease that ended, make history without growth. While the quota is exceeded, these
        # are the way out, so each look that finds something written compacts.
        over = status.in_use_bytes > self._quota
        pressed = space_requested or status.no_space or over
        if space_requested or status.no_space:
            # Deletes alone, which are taken also from a full store.
            await self._trimmer.trim()
            status = await self._connection.status()
        compacts = self._should_compact(status, pressed=pressed)
        if compacts:
            status = await self._compact(status)
        if self._should_defragment(status, compacted=compacts):
            status = await self._defragment(status)
        if status.no_space and status.size_bytes < hard_quota(self._quota) - self._quota // _DEFRAGMENT_FRACTION:
            await self._connection.disarm()
            log.info("etcd takes writes again", size_bytes=status.size_bytes, quota_bytes=self._quota)
            status = await self._connection.status()
        advice = (
            f"its data take {size_text(status.in_use_bytes, Rounding.UP)}, and etcd_quota is {size_text(self._quota)};"
            " delete containers, volumes or revisions that are not needed, or raise etcd_quota"
        )
        self._publish(advice if status.no_space else "", reserved=advice if status.in_use_bytes > self._quota else "")

    def _should_compact(self, status: MemberStatus, *, pressed: bool) -> bool:
        if not self._others_wrote(status):
            return False
        # What a compaction has freed may be seen only later.
        self._floor = min(self._floor, status.in_use_bytes)
        grown = status.in_use_bytes - self._floor
        more_than_half = status.in_use_bytes > self._quota // 2
        return (
            pressed
            or grown > self._quota // _COMPACT_FRACTION
            or (more_than_half and (self._floor == 0 or grown > self._quota // _COMPACT_FRACTION_WHEN_HALF))
        )

    def _others_wrote(self, status: MemberStatus) -> bool:
        """Whether anything was written since the last compaction but by the keeper."""
        return status.revision > self._compacted + self._own_puts

    async def _compact(self, status: MemberStatus) -> MemberStatus:
        await _compact_idempotent(self._connection.compact, status.revision)
        self._compacted, self._own_puts = status.revision, 0
        with suppress(CallFailed):
            for _ in range(_BACKEND_COMMITS):
                await self._connection.txn(success=[messages.put(self._marker_key, b"")])
                self._own_puts += 1
                await asyncio.sleep(_BACKEND_COMMIT_SECONDS)
        after = await self._connection.status()
        if not self._others_wrote(after):
            # Else some of it is history already.
            self._floor = after.in_use_bytes
        log.info("history was compacted", in_use_bytes=after.in_use_bytes, before_bytes=status.in_use_bytes)
        return after

    def _should_defragment(self, status: MemberStatus, *, compacted: bool) -> bool:
        free = status.size_bytes - status.in_use_bytes
        if status.no_space:
            return compacted or free > self._quota // _DEFRAGMENT_FRACTION_WHEN_FULL
        if free < self._quota // _DEFRAGMENT_FRACTION:
            return False
        return free >= status.in_use_bytes or status.size_bytes >= self._quota * _LARGE_16THS // 16

    async def _defragment(self, status: MemberStatus) -> MemberStatus:
        log.info("defragmenting", size_bytes=status.size_bytes, in_use_bytes=status.in_use_bytes)
        await self._connection.defragment()
        after = await self._connection.status()
        log.info("defragmented", size_bytes=after.size_bytes, in_use_bytes=after.in_use_bytes)
        return after

    def _publish(self, full: str, *, reserved: str) -> None:
        if full and not self._capacity.full:
            log.error("the store is full", detail=full)
        if (self._capacity.full or self._capacity.reserved) and not (full or reserved):
            log.info("the store has room again")
        self._capacity.full, self._capacity.reserved = full, reserved
        self._capacity.mark_checked()


async def _compact_idempotent(compact: Callable[[int], Awaitable[None]], revision: int) -> None:
    """Compact; etcd's own compaction by time may have come further."""
    try:
        await compact(revision)
    except CallFailed as failure:
        if "compacted" not in failure.detail:
            raise
