"""Fills the database of an etcd with unrelated data, and frees the space again as its operator would."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import grpc
from aetcd import rpc

_PREFIX = b"/filler/"
_SECONDS = 30.0
_PIECES = (1 << 20, 64 << 10, 1 << 10)


class EtcdFiller:
    """An async context manager. The keys that it has put stay until `remove`."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is an address for grpc, such as `unix:PATH`."""
        self._endpoint = endpoint
        self._count = 0

    async def __aenter__(self) -> Self:
        self._channel = rpc.insecure_channel(self._endpoint)
        self._kv = rpc.KVStub(self._channel)
        self._maintenance = rpc.MaintenanceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def fill(self) -> None:
        """Put smaller and smaller values until etcd accepts none: its NOSPACE alarm is raised then."""
        for size in _PIECES:
            while await self._put(size):
                pass

    async def overwrite(self, size_bytes: int) -> None:
        """Put `size_bytes` of values at one key, one over the other: history that a compaction frees."""
        for _ in range(size_bytes >> 20):
            if not await self._put(1 << 20, _PREFIX + b"history"):
                return

    async def _put(self, size: int, key: bytes = b"") -> bool:
        self._count += 1
        key = key or _PREFIX + str(self._count).encode()
        try:
            await self._kv.Put(rpc.PutRequest(key=key, value=b"x" * size), timeout=_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return False
        return True

    async def put(self, pieces: int, size: int) -> None:
        """Put `pieces` keys of `size` bytes each. Raises AssertionError if etcd is full."""
        for _ in range(pieces):
            assert await self._put(size)

    async def delete(self) -> None:
        """Delete all keys of this filler, without a compaction."""
        await self._kv.DeleteRange(rpc.DeleteRangeRequest(key=_PREFIX, range_end=_PREFIX[:-1] + b"0"), timeout=_SECONDS)

    async def remove(self) -> None:
        """Delete all keys of this filler, compact, defragment and disarm the alarm."""
        end = rpc.DeleteRangeRequest(key=_PREFIX, range_end=_PREFIX[:-1] + b"0")
        deleted = await self._kv.DeleteRange(end, timeout=_SECONDS)
        compaction = rpc.CompactionRequest(revision=deleted.header.revision, physical=True)
        await self._kv.Compact(compaction, timeout=_SECONDS)
        await self._maintenance.Defragment(rpc.DefragmentRequest(), timeout=_SECONDS)
        alarms = await self._maintenance.Alarm(rpc.AlarmRequest(action=rpc.AlarmRequest.GET), timeout=_SECONDS)
        for alarm in alarms.alarms:
            disarm = rpc.AlarmRequest(action=rpc.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=alarm.alarm)
            await self._maintenance.Alarm(disarm, timeout=_SECONDS)

    async def delete_prefix(self, prefix: str) -> None:
        """Delete every key that begins with `prefix`."""
        keys = rpc.DeleteRangeRequest(key=prefix.encode(), range_end=prefix[:-1].encode() + b"0")
        await self._kv.DeleteRange(keys, timeout=_SECONDS)

    async def status(self) -> Any:
        """The answer of etcd's Status call: revision, size of the database, alarms."""
        return await self._maintenance.Status(rpc.StatusRequest(), timeout=_SECONDS)

    async def bytes_put_since(self, revision: int) -> int:
        """The size of all keys and values that were put after a revision."""
        watch = rpc.WatchStub(self._channel).Watch(timeout=_SECONDS)
        last = (await self.status()).header.revision
        create = rpc.WatchCreateRequest(key=b"\0", range_end=b"\0", start_revision=revision + 1)
        await watch.write(rpc.WatchRequest(create_request=create))
        total, read = 0, revision
        while read < last:
            for event in (await watch.read()).events:
                total += len(event.kv.key) + len(event.kv.value)
                read = event.kv.mod_revision
        watch.cancel()
        return total
