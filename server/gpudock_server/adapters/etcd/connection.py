"""The way to etcd: one channel, a time limit on every call, and one kind of error.

Everything that a call can end with is mapped here: nothing of grpc's or aetcd's leaves this file.
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

# What these codes say of a call is that nobody knows whether it was done.
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
# Refusals that pass: etcd has more to do than it can, or its users were changed while it looked at the call.
_RETRYABLE_MESSAGES = ("too many requests", "revision of auth store is old")
# What etcd says of a put when its database is as large as it may become, and of its alarm for that.
_NO_SPACE = "database space exceeded"
_NO_SPACE_ALARM = "NOSPACE"
# Compaction and defragmentation go through all that there is.
_MAINTENANCE_SECONDS = 120.0
# A member that has lost its leader is to say so, instead of being silent for as long as that lasts.
_HAS_LEADER = (("hasleader", "true"),)


CLUSTER_IS_FULL = (
    "etcd has raised its alarm NOSPACE; compact and defragment it and disarm the alarm (etcdctl compact, defrag,"
    " alarm disarm), or give it a larger --quota-backend-bytes"
)


class CallFailed(Exception):
    """A call that brought no result. `code` is the name of a gRPC status, `detail` what etcd or grpc said."""

    def __init__(self, code: str, detail: str, *, outcome_unknown: bool) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        # Whether it may have been done all the same.
        self.outcome_unknown = outcome_unknown

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed in a moment."""
        return self.outcome_unknown or any(phrase in self.detail for phrase in _RETRYABLE_MESSAGES)

    @property
    def no_space(self) -> bool:
        """Whether etcd refused to store more."""
        return _NO_SPACE in self.detail

    def to_store_error(self) -> StoreUnavailable:
        """The error that core is given."""
        return StoreFull(CLUSTER_IS_FULL) if self.no_space else StoreUnavailable(str(self))


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """The state of the member that answered, and the size of its database.

    `problem` is empty when it serves. `no_space`: its alarm for that is raised, and it takes only reads and deletions.
    """

    version: str
    problem: str
    no_space: bool
    revision: int
    size_bytes: int
    in_use_bytes: int


class EtcdConnection:
    """A channel to etcd, shared by all that speak to it. `timeout` bounds each call.

    `open` does not wait for etcd; a first call does, as far as its time limit goes.
    """

    def __init__(self, address: EtcdAddress, *, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        self._timeout = timeout.total_seconds()
        self._client = EtcdClient(address, timeout=self._timeout)
        self._usable = asyncio.Event()
        # The highest revision that any answer has shown: whatever is done from now on gets a higher one.
        self.revision = 0

    async def open(self) -> None:
        """Make the channel, and log in where there is a user.

        Raises StartupError for an address, certificates or credentials that are no good, StoreUnavailable where etcd
        does not answer to the login.
        """
        self._usable.set()
        try:
            async with self._mapped_errors():
                await self._client.connect()
        except CallFailed as failure:
            raise failure.to_store_error() from None

    async def close(self) -> None:
        """Let go of the channel; calls that are on their way fail."""
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
        """Do `success` if all of `compare` hold, else `failure`; tried once, for at most `timeout` s.

        Raises CallFailed.
        """
        request = txn_request(compare, success, failure)
        try:
            answer = txn_response(await self._call(lambda: self._client.kvstub.Txn, request, timeout))
        except CallFailed as error:
            if not (error.no_space and success and not compare and all(is_read(do) for do in success)):
                raise
            answer = await self._read_ranges(success, timeout)
        self.revision = max(self.revision, answer.revision)
        return answer

    async def _read_ranges(self, reads: Sequence[TxnOperation], timeout: float | None) -> TxnResponse:
        """The reads by themselves: an etcd that is full refuses every transaction, also one that only reads."""
        revision, answers = 0, []
        for read in reads:
            # All at the moment of the first.
            answer = await self._call(self._range, range_request(read, at=revision), timeout)
            revision = revision or int(answer.header.revision)
            answers.append(range_response(answer))
        return TxnResponse(succeeded=True, revision=revision, ranges=tuple(answers))

    def _range(self) -> Message:
        return self._client.kvstub.Range

    async def delete(self, keys: KeyRange) -> None:
        """Remove every key of a range, whatever they hold; a full etcd takes this as well. Raises CallFailed."""
        request = rpc.DeleteRangeRequest(key=keys.start, range_end=keys.end)
        await self._call(lambda: self._client.kvstub.DeleteRange, request)

    async def read(self, *reads: TxnOperation, retry_for: timedelta) -> TxnResponse:
        """Do `reads` at one moment; tries again while there is `retry_for`. Raises CallFailed."""
        return await self.with_retries(lambda timeout: self.txn(success=reads, timeout=timeout), retry_for)

    async def with_retries(self, call: Callable[[float], Awaitable[T]], retry_for: timedelta) -> T:
        """Try `call`, which may safely be repeated, until it is answered or `retry_for` is at its end.

        `call` gets the seconds that it may take. Raises the last CallFailed.
        """
        backoff = Backoff(retry_for)
        while True:
            try:
                return await call(backoff.left)
            except CallFailed as failure:
                if not failure.retryable or not await backoff.pause():
                    raise

    async def grant(self, ttl_seconds: int) -> int:
        """A new lease's id. Raises CallFailed; one that was granted all the same ends by itself."""
        answer = await self._call(lambda: self._client.leasestub.LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl_seconds))
        return int(answer.ID)

    async def keep_alive(self, lease: int) -> int:
        """Begin a lease's time anew; the seconds it now has, 0 when it is gone. Raises CallFailed."""
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
            raise CallFailed("UNAVAILABLE", "the keep-alive stream ended without an answer", outcome_unknown=True)

        return await self._with_login(first_answer)

    async def revoke(self, lease: int) -> None:
        """End a lease, and every key that it holds. Raises CallFailed."""
        await self._call(lambda: self._client.leasestub.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease))

    async def watch(self, keys: KeyRange, start: int, *, timeout: float | None = None) -> WatchStream:
        """Begin to watch a range from revision `start` on, which may be one that is to come.

        Returns when etcd has said that it does, within `timeout` s. Raises CallFailed.
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
                raise CallFailed("DEADLINE_EXCEEDED", "etcd did not begin to watch", outcome_unknown=True) from None
            except BaseException:
                stream.close()
                raise
            return stream

        return await self._with_login(begin)

    async def status(self) -> MemberStatus:
        """How the member that answers is. Raises CallFailed."""
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
        """Forget what was overwritten or deleted before `revision`; returns when it is done. Raises CallFailed."""
        request = rpc.CompactionRequest(revision=revision, physical=True)
        await self._call(lambda: self._client.kvstub.Compact, request, longest=_MAINTENANCE_SECONDS)

    async def defragment(self) -> None:
        """Give what is free in the member's file back; it answers nothing meanwhile. Raises CallFailed."""
        request = rpc.DefragmentRequest()
        await self._call(lambda: self._client.maintenancestub.Defragment, request, longest=_MAINTENANCE_SECONDS)

    async def disarm(self) -> None:
        """Take back every NOSPACE alarm that is raised. Raises CallFailed."""
        raised = await self._call(
            lambda: self._client.maintenancestub.Alarm, rpc.AlarmRequest(action=rpc.AlarmRequest.GET)
        )
        for alarm in raised.alarms:
            if alarm.alarm == rpc.NOSPACE:
                taken_back = rpc.AlarmRequest(
                    action=rpc.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=alarm.alarm
                )
                await self._call(lambda: self._client.maintenancestub.Alarm, taken_back)

    async def _call(
        self,
        method: Callable[[], Message],
        request: Message,
        timeout: float | None = None,
        *,
        longest: float | None = None,
    ) -> Message:
        """`timeout` can only shorten the limit of a call, which is `longest`, else the connection's."""
        limit = min(one for one in (timeout, longest or self._timeout) if one is not None)

        async def once() -> Message:
            return await method()(request, timeout=limit, metadata=self._client.metadata)

        return await self._with_login(once)

    async def _with_login(self, call: Callable[[], Awaitable[T]]) -> T:
        """Do `call`, and once more with a new token where etcd no longer takes the one we have."""
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
            raise CallFailed("CANCELLED", "this daemon has closed its connection", outcome_unknown=True)
        try:
            yield
        except grpc.aio.AioRpcError as error:
            code, detail = error.code(), error.details() or "no details"
            raise CallFailed(code.name, detail, outcome_unknown=code in _OUTCOME_UNKNOWN) from None
        except grpc.aio.UsageError as error:
            raise CallFailed("CANCELLED", str(error), outcome_unknown=True) from None
        except asyncio.CancelledError:
            # grpc ends calls on a channel that is being closed in the same way as those of a cancelled task.
            task = asyncio.current_task()
            if not self._usable.is_set() and task is not None and not task.cancelling():
                raise CallFailed("CANCELLED", "this daemon has closed its connection", outcome_unknown=True) from None
            raise


class WatchStream:
    """A watch of one range, which lasts until it is closed or fails.

    What is not read stays with etcd, but for a few messages on the way.
    """

    def __init__(self, call: Message, mapped_errors: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self._call = call
        self._mapped_errors = mapped_errors

    async def begin(self, keys: KeyRange, start: int) -> None:
        """Ask for it. Raises CallFailed."""
        async with self._mapped_errors():
            await self._call.write(watch_request(keys, start))
        # etcd confirms, also where it refuses; a refusal for what was compacted follows as a message of its own.
        answer = await self.read()
        if answer.refusal:
            raise CallFailed("PERMISSION_DENIED", answer.refusal, outcome_unknown=False)

    async def read(self) -> WatchMessage:
        """The next message. Cancelling it ends the watch. Raises CallFailed."""
        async with self._mapped_errors():
            answer = await self._call.read()
        if answer is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in its stubs
            raise CallFailed("UNAVAILABLE", "etcd ended the watch", outcome_unknown=True)
        return watch_message(answer)

    def close(self) -> None:
        """End it; may be repeated."""
        self._call.cancel()


class Backoff:
    """Growing pauses between tries, until `retry_for` is at its end."""

    def __init__(self, retry_for: timedelta) -> None:
        self._until = asyncio.get_running_loop().time() + retry_for.total_seconds()
        self._next = _MIN_BACKOFF_SECONDS

    @property
    def left(self) -> float:
        """Seconds until the end; never quite 0, so that a call always gets a chance."""
        return max(self._until - asyncio.get_running_loop().time(), 0.001)

    async def pause(self) -> bool:
        """Wait a little. False, at once, when another try would come too late."""
        if asyncio.get_running_loop().time() + self._next >= self._until:
            return False
        await asyncio.sleep(self._next)
        self._next = min(self._next * 2, _MAX_BACKOFF_SECONDS)
        return True
