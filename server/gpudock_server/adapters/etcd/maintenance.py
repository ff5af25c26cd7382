"""Keeps the store from filling up: limits operations, and compacts and defragments the embedded etcd.

A cluster has its own operator: here only the operations are limited, and a full cluster is detected. The embedded etcd
has a quota and a reserve on top. Its history is compacted by size, in addition to etcd's own compaction by time; a file
that is mostly free is defragmented; and a NOSPACE alarm is disarmed once there is space. If the data alone reach the
quota, only operations that free space may begin, and use the reserve.
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

# History is compacted when the database has grown by this part (1/8) of the quota,
_COMPACT_FRACTION = 8
# or by this part if more than half of the quota is in use.
_COMPACT_FRACTION_WHEN_HALF = 32
# The file is defragmented if this part of the quota is free in it, and it is at least half free or
_DEFRAGMENT_FRACTION = 16
# as large as this many 16ths of the quota. With a NOSPACE alarm this part of the quota free in it is enough.
_LARGE_16THS = 14
_DEFRAGMENT_FRACTION_WHEN_FULL = 64
# etcd counts freed pages as free two backend commits later, and commits writes every 0.1 s.
_BACKEND_COMMITS = 2
_BACKEND_COMMIT_SECONDS = 0.15

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def hard_quota(quota_bytes: int) -> int:
    """The quota for etcd itself: with a reserve for operations that free space or must end."""
    return quota_bytes + max(quota_bytes // 4, 4 << 20)


class StoreMaintenance:
    """Checks the store every `CHECK_SECONDS`, and whenever a write failed for lack of space."""

    def __init__(
        self,
        connection: EtcdConnection,
        capacity: StoreCapacity,
        trimmer: OperationTrimmer,
        marker_key: bytes,
        *,
        quota_bytes: int = 0,
    ) -> None:
        """`quota_bytes` is the quota of the embedded etcd; 0 means a cluster, which is not compacted here."""
        self._connection = connection
        self._capacity = capacity
        self._trimmer = trimmer
        self._marker_key = marker_key
        self._quota = quota_bytes
        capacity.can_reclaim = bool(quota_bytes)
        if quota_bytes:
            trimmer.limit_to(quota_bytes)
        # The bytes in use after the last compaction, its revision, and the number of our own puts since then.
        self._floor = 0
        self._compacted = 0
        self._own_puts = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Check once, then periodically in the background. Raises CallFailed."""
        await self._check()
        self._task = asyncio.create_task(self._run(), name="store maintenance")

    async def close(self) -> None:
        """Stop the checks."""
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
                log.warning("store maintenance failed; will retry", reason=str(failure))
                await asyncio.sleep(1)
            except Exception:
                # A defect; without maintenance the store would fill up.
                log.exception("store maintenance failed")
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
            # A trim only deletes, which a full store accepts.
            await self._trimmer.trim()
            status = await self._connection.status()
        compacts = self._should_compact(status, pressed=pressed)
        if compacts:
            status = await self._compact(status)
        if self._should_defragment(status, compacted=compacts):
            status = await self._defragment(status)
        if status.no_space and status.size_bytes < hard_quota(self._quota) - self._quota // _DEFRAGMENT_FRACTION:
            await self._connection.disarm()
            log.info("etcd accepts writes again", size_bytes=status.size_bytes, quota_bytes=self._quota)
            status = await self._connection.status()
        advice = (
            f"its data use {size_text(status.in_use_bytes, Rounding.UP)} and etcd_quota is {size_text(self._quota)};"
            " delete containers, volumes or revisions that are not needed, or raise etcd_quota"
        )
        self._publish(advice if status.no_space else "", reserved=advice if status.in_use_bytes > self._quota else "")

    def _should_compact(self, status: MemberStatus, *, pressed: bool) -> bool:
        if not self._others_wrote(status):
            return False
        # Space freed by a compaction may show up later.
        self._floor = min(self._floor, status.in_use_bytes)
        grown = status.in_use_bytes - self._floor
        more_than_half = status.in_use_bytes > self._quota // 2
        return (
            pressed
            or grown > self._quota // _COMPACT_FRACTION
            or (more_than_half and (self._floor == 0 or grown > self._quota // _COMPACT_FRACTION_WHEN_HALF))
        )

    def _others_wrote(self, status: MemberStatus) -> bool:
        """Whether anything but our own puts was written since the last compaction."""
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
            # Otherwise part of it is history that a compaction can free.
            self._floor = after.in_use_bytes
        log.info("etcd compacted", in_use_bytes=after.in_use_bytes, before_bytes=status.in_use_bytes)
        return after

    def _should_defragment(self, status: MemberStatus, *, compacted: bool) -> bool:
        free = status.size_bytes - status.in_use_bytes
        if status.no_space:
            return compacted or free > self._quota // _DEFRAGMENT_FRACTION_WHEN_FULL
        if free < self._quota // _DEFRAGMENT_FRACTION:
            return False
        return free >= status.in_use_bytes or status.size_bytes >= self._quota * _LARGE_16THS // 16

    async def _defragment(self, status: MemberStatus) -> MemberStatus:
        log.info("etcd defragmentation started", size_bytes=status.size_bytes, in_use_bytes=status.in_use_bytes)
        await self._connection.defragment()
        after = await self._connection.status()
        log.info("etcd defragmented", size_bytes=after.size_bytes, in_use_bytes=after.in_use_bytes)
        return after

    def _publish(self, full: str, *, reserved: str) -> None:
        if full and not self._capacity.full:
            log.error("store full", detail=full)
        if (self._capacity.full or self._capacity.reserved) and not (full or reserved):
            log.info("store has space again")
        self._capacity.full, self._capacity.reserved = full, reserved
        self._capacity.mark_checked()


async def _compact_idempotent(compact: Callable[[int], Awaitable[None]], revision: int) -> None:
    """Compact up to `revision`, unless etcd's own compaction by time has done so already."""
    try:
        await compact(revision)
    except CallFailed as failure:
        if "compacted" not in failure.detail:
            raise
