"""The connection to etcd: one channel, a time limit for every call, and one error, CallFailed.

All errors of grpc and aetcd are translated here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import grpc
import grpc.aio
from aetcd import rpc

from gpudock_server.adapters.etcd.client import EtcdAddress, EtcdClient
from gpudock_server.adapters.etcd.keys import KeyRange
from gpudock_server.adapters.etcd.messages import (
    Compare,
    Message,
    TxnOperation,
    TxnResponse,
    WatchMessage,
    is_read,
    range_request,
    range_response,
    txn_request,
    txn_response,
    watch_message,
    watch_request,
)
from gpudock_server.errors import StoreFull, StoreUnavailable

T = TypeVar("T")

DEFAULT_TIMEOUT = timedelta(seconds=2)

_MIN_BACKOFF_SECONDS = 0.02
_MAX_BACKOFF_SECONDS = 0.5

# With these codes it is unknown whether the call was done.
_OUTCOME_UNKNOWN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
# Temporary rejections: etcd is overloaded, or its users were changed during the call.
_RETRYABLE_MESSAGES = ("too many requests", "revision of auth store is old")
# etcd's message for a put that exceeds its quota, and its name of the alarm for that.
_NO_SPACE = "database space exceeded"
_NO_SPACE_ALARM = "NOSPACE"
# Compaction and defragmentation process the whole database.
_MAINTENANCE_SECONDS = 120.0
# Makes a member without a leader end the watch, instead of sending nothing.
_HAS_LEADER = (("hasleader", "true"),)


CLUSTER_IS_FULL = (
    "etcd has raised the NOSPACE alarm; compact and defragment it and disarm the alarm (etcdctl compact, defrag,"
    " alarm disarm), or raise --quota-backend-bytes"
)


class CallFailed(Exception):
    """A call failed. `code` is the name of a gRPC status, `detail` the message of etcd or grpc."""

    def __init__(self, code: str, detail: str, *, outcome_unknown: bool) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        # Whether the call may have been done nevertheless.
        self.outcome_unknown = outcome_unknown

    @property
    def retryable(self) -> bool:
        """Whether a retry of the call may succeed."""
        return self.outcome_unknown or any(phrase in self.detail for phrase in _RETRYABLE_MESSAGES)

    @property
    def no_space(self) -> bool:
        """Whether etcd is out of space."""
        return _NO_SPACE in self.detail

    def to_store_error(self) -> StoreUnavailable:
        """The error for core."""
        return StoreFull(CLUSTER_IS_FULL) if self.no_space else StoreUnavailable(str(self))


@asynccontextmanager
async def store_errors() -> AsyncIterator[None]:
    """Raise StoreUnavailable or StoreFull in place of CallFailed."""
    try:
        yield
    except CallFailed as failure:
        raise failure.to_store_error() from None


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """The state of the member that answered, and the size of its database.

    `problem` is empty if it serves. `no_space`: its NOSPACE alarm is raised, and it accepts only reads and deletes.
    """

    version: str
    problem: str
    no_space: bool
    revision: int
    size_bytes: int
    in_use_bytes: int


class EtcdConnection:
    """The channel to etcd, shared by all its users. `timeout` limits each call.

    `open` does not wait until etcd is reachable; calls do, within their time limit.
    """

    def __init__(self, address: EtcdAddress, *, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        self._timeout = timeout.total_seconds()
        self._client = EtcdClient(address, timeout=self._timeout)
        self._usable = asyncio.Event()
        # The highest revision in any response so far: later writes get higher ones.
        self.revision = 0

    async def open(self) -> None:
        """Open the channel, and log in if a user is set.

        Raises StartupError for an unusable address, certificates or credentials, StoreUnavailable if etcd does not
        answer the login.
        """
        self._usable.set()
        async with store_errors(), self._mapped_errors():
            await self._client.connect()

    async def close(self) -> None:
        """Close the channel; running calls fail."""
        self._usable.clear()
        await self._client.close()

    async def txn(
        self,
        compare: Sequence[Compare] = (),
        success: Sequence[TxnOperation] = (),
        failure: Sequence[TxnOperation] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResponse:
        """Execute `success` if all of `compare` hold, else `failure`. One try of at most `timeout` seconds.

        Raises CallFailed.
        """
        request = txn_request(compare, success, failure)
        try:
            answer = txn_response(await self._call(lambda: self._client.kvstub.Txn, request, timeout))
        except CallFailed as error:
            if not (error.no_space and success and not compare and all(is_read(operation) for operation in success)):
                raise
            answer = await self._read_ranges(success, timeout)
        self.revision = max(self.revision, answer.revision)
        return answer

    async def _read_ranges(self, reads: Sequence[TxnOperation], timeout: float | None) -> TxnResponse:
        """Do the reads outside a transaction: a full etcd rejects every transaction, also one that only reads."""
        revision, answers = 0, []
        for read in reads:
            # All at the revision of the first read.
            answer = await self._call(self._range, range_request(read, at=revision), timeout)
            revision = revision or int(answer.header.revision)
            answers.append(range_response(answer))
        return TxnResponse(succeeded=True, revision=revision, ranges=tuple(answers))

    def _range(self) -> Message:
        return self._client.kvstub.Range

    async def delete(self, keys: KeyRange) -> None:
        """Delete every key of a range; a full etcd accepts this too. Raises CallFailed."""
        request = rpc.DeleteRangeRequest(key=keys.start, range_end=keys.end)
        await self._call(lambda: self._client.kvstub.DeleteRange, request)

    async def read(self, *reads: TxnOperation, retry_for: timedelta) -> TxnResponse:
        """Do `reads` at one revision; retries for up to `retry_for`. Raises CallFailed."""
        return await self.with_retries(lambda timeout: self.txn(success=reads, timeout=timeout), retry_for)

    async def with_retries(self, call: Callable[[float], Awaitable[T]], retry_for: timedelta) -> T:
        """Retry `call`, which must be safe to repeat, until it succeeds or `retry_for` has passed.

        `call` gets the number of seconds that it may take. Raises the last CallFailed.
        """
        backoff = Backoff(retry_for)
        while True:
            try:
                return await call(backoff.left)
            except CallFailed as failure:
                if not failure.retryable or not await backoff.pause():
                    raise

    async def grant(self, ttl_seconds: int) -> int:
        """Grant a lease and return its id. Raises CallFailed; a lease that was granted nevertheless expires."""
        answer = await self._call(lambda: self._client.leasestub.LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl_seconds))
        return int(answer.ID)

    async def keep_alive(self, lease: int) -> int:
        """Renew a lease; returns its time to live in seconds, 0 if it has expired. Raises CallFailed."""
        request = rpc.LeaseKeepAliveRequest(ID=lease)

        async def first_answer() -> int:
            stream = self._client.leasestub.LeaseKeepAlive(
                iter([request]), timeout=self._timeout, metadata=self._client.metadata
            )
            try:
                async for answer in stream:
                    return int(answer.TTL)
            finally:
                stream.cancel()
            raise CallFailed("UNAVAILABLE", "the keep-alive stream ended without a response", outcome_unknown=True)

        return await self._with_login(first_answer)

    async def revoke(self, lease: int) -> None:
        """Revoke a lease, which deletes its keys. Raises CallFailed."""
        await self._call(lambda: self._client.leasestub.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease))

    async def watch(self, keys: KeyRange, start: int, *, timeout: float | None = None) -> WatchStream:
        """Watch a range from revision `start` on, which may be a future one.

        Returns after etcd has confirmed the watch, within `timeout` seconds. Raises CallFailed.
        """
        limit = self._timeout if timeout is None else min(timeout, self._timeout)

        async def begin() -> WatchStream:
            stream = WatchStream(
                self._client.watchstub.Watch(metadata=(*(self._client.metadata or ()), *_HAS_LEADER)),
                self._mapped_errors,
            )
            try:
                async with asyncio.timeout(limit):
                    await stream.begin(keys, start)
            except TimeoutError:
                stream.close()
                raise CallFailed(
                    "DEADLINE_EXCEEDED", "timed out waiting for etcd to start the watch", outcome_unknown=True
                ) from None
            except BaseException:
                stream.close()
                raise
            return stream

        return await self._with_login(begin)

    async def status(self) -> MemberStatus:
        """The status of the member that answers. Raises CallFailed."""
        answer = await self._call(lambda: self._client.maintenancestub.Status, rpc.StatusRequest())
        errors = [str(error) for error in answer.errors]
        others = [error for error in errors if _NO_SPACE_ALARM not in error]
        return MemberStatus(
            version=str(answer.version),
            problem="; ".join(others or ([] if answer.leader else ["etcd has no leader"])),
            no_space=len(others) < len(errors),
            revision=int(answer.header.revision),
            size_bytes=int(answer.dbSize),
            in_use_bytes=int(answer.dbSizeInUse),
        )

    async def compact(self, revision: int) -> None:
        """Delete the history before `revision`; returns when this is done. Raises CallFailed."""
        request = rpc.CompactionRequest(revision=revision, physical=True)
        await self._call(lambda: self._client.kvstub.Compact, request, longest=_MAINTENANCE_SECONDS)

    async def defragment(self) -> None:
        """Return free space of the member's file to the disk; it answers no calls meanwhile. Raises CallFailed."""
        request = rpc.DefragmentRequest()
        await self._call(lambda: self._client.maintenancestub.Defragment, request, longest=_MAINTENANCE_SECONDS)

    async def disarm(self) -> None:
        """Disarm all raised NOSPACE alarms. Raises CallFailed."""
        raised = await self._call(
            lambda: self._client.maintenancestub.Alarm, rpc.AlarmRequest(action=rpc.AlarmRequest.GET)
        )
        for alarm in raised.alarms:
            if alarm.alarm == rpc.NOSPACE:
                request = rpc.AlarmRequest(
                    action=rpc.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=alarm.alarm
                )
                await self._call(lambda: self._client.maintenancestub.Alarm, request)

    async def _call(
        self,
        method: Callable[[], Message],
        request: Message,
        timeout: float | None = None,
        *,
        longest: float | None = None,
    ) -> Message:
        """One call. Its limit is `longest` or else the connection's timeout; `timeout` can only shorten it."""
        limit = longest or self._timeout
        if timeout is not None:
            limit = min(limit, timeout)

        async def once() -> Message:
            return await method()(request, timeout=limit, metadata=self._client.metadata)

        return await self._with_login(once)

    async def _with_login(self, call: Callable[[], Awaitable[T]]) -> T:
        """Do `call`, and repeat it once with a new token if etcd rejects the current one."""
        token = self._client.metadata
        try:
            async with self._mapped_errors():
                return await call()
        except CallFailed as failure:
            if failure.code != grpc.StatusCode.UNAUTHENTICATED.name or token is None:
                raise
        async with self._mapped_errors():
            await self._client.log_in(instead_of=token)
            return await call()

    @asynccontextmanager
    async def _mapped_errors(self) -> AsyncIterator[None]:
        if not self._usable.is_set():
            raise CallFailed("CANCELLED", "the connection was closed by this daemon", outcome_unknown=True)
        try:
            yield
        except grpc.aio.AioRpcError as error:
            code, detail = error.code(), error.details() or "no details"
            raise CallFailed(code.name, detail, outcome_unknown=code in _OUTCOME_UNKNOWN) from None
        except grpc.aio.UsageError as error:
            raise CallFailed("CANCELLED", str(error), outcome_unknown=True) from None
        except asyncio.CancelledError:
            # Closing the channel raises CancelledError in running calls, as does cancelling their task.
            task = asyncio.current_task()
            if not self._usable.is_set() and task is not None and not task.cancelling():
                raise CallFailed(
                    "CANCELLED", "the connection was closed by this daemon", outcome_unknown=True
                ) from None
            raise


class WatchStream:
    """A watch of one range, until it is closed or fails.

    Unread messages stay in etcd, except for a few that are buffered on the way.
    """

    def __init__(self, call: Message, mapped_errors: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self._call = call
        self._mapped_errors = mapped_errors

    async def begin(self, keys: KeyRange, start: int) -> None:
        """Start the watch. Raises CallFailed."""
        async with self._mapped_errors():
            await self._call.write(watch_request(keys, start))
        # The first message confirms or rejects the watch; an error about a compacted revision follows in a second one.
        answer = await self.read()
        if answer.refusal:
            raise CallFailed("PERMISSION_DENIED", answer.refusal, outcome_unknown=False)

    async def read(self) -> WatchMessage:
        """The next message. Cancelling this call ends the watch. Raises CallFailed."""
        async with self._mapped_errors():
            answer = await self._call.read()
        if answer is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in its stubs
            raise CallFailed("UNAVAILABLE", "etcd closed the watch", outcome_unknown=True)
        return watch_message(answer)

    def close(self) -> None:
        """End the watch. May be called again."""
        self._call.cancel()


class Backoff:
    """Exponential backoff between tries, with a deadline after `retry_for`."""

    def __init__(self, retry_for: timedelta) -> None:
        self._until = asyncio.get_running_loop().time() + retry_for.total_seconds()
        self._next = _MIN_BACKOFF_SECONDS

    @property
    def left(self) -> float:
        """Seconds until the deadline; at least 1 ms, so that a call is always tried."""
        return max(self._until - asyncio.get_running_loop().time(), 0.001)

    async def pause(self) -> bool:
        """Wait until the next try. False, immediately, if that would be after the deadline."""
        if asyncio.get_running_loop().time() + self._next >= self._until:
            return False
        await asyncio.sleep(self._next)
        self._next = min(self._next * 2, _MAX_BACKOFF_SECONDS)
        return True
