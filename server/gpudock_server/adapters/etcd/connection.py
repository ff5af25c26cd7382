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

from gpudock_server.adapters.etcd.channel import EtcdAddress, EtcdClient
from gpudock_server.adapters.etcd.keys import KeyRange
from gpudock_server.adapters.etcd.wire import (
    Compare,
    Do,
    Message,
    TxnAnswer,
    WatchAnswer,
    txn_answer,
    txn_request,
    watch_answer,
    watch_request,
)
from gpudock_server.errors import StoreUnavailable

T = TypeVar("T")

DEFAULT_TIMEOUT = timedelta(seconds=2)

_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.5

# What these codes say of a call is that nobody knows whether it was done.
_UNANSWERED = frozenset(
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
_PASSING = ("too many requests", "revision of auth store is old")
# A member that has lost its leader is to say so, instead of being silent for as long as that lasts.
_HAS_LEADER = (("hasleader", "true"),)


class CallFailed(Exception):
    """A call that brought no result. `code` is the name of a gRPC status, `detail` what etcd or grpc said."""

    def __init__(self, code: str, detail: str, *, unanswered: bool) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        # Whether it may have been done all the same.
        self.unanswered = unanswered

    @property
    def passing(self) -> bool:
        """Whether the same call may succeed in a moment."""
        return self.unanswered or any(phrase in self.detail for phrase in _PASSING)


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the member that answered. `trouble` is empty when it takes writes."""

    version: str
    trouble: str


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
            raise StoreUnavailable(str(failure)) from None

    async def close(self) -> None:
        """Let go of the channel; calls that are on their way fail."""
        self._usable.clear()
        await self._client.close()

    async def txn(
        self,
        compare: Sequence[Compare] = (),
        success: Sequence[Do] = (),
        failure: Sequence[Do] = (),
        *,
        timeout: float | None = None,
    ) -> TxnAnswer:
        """Do `success` if all of `compare` hold, else `failure`; tried once, for at most `timeout` s.

        Raises CallFailed.
        """
        request = txn_request(compare, success, failure)
        answer = txn_answer(await self._call(lambda: self._client.kvstub.Txn, request, timeout))
        self.revision = max(self.revision, answer.revision)
        return answer

    async def read(self, *reads: Do, patience: timedelta) -> TxnAnswer:
        """Do `reads` at one moment; tries again while there is `patience`. Raises CallFailed."""
        return await self.patiently(lambda timeout: self.txn(success=reads, timeout=timeout), patience)

    async def patiently(self, call: Callable[[float], Awaitable[T]], patience: timedelta) -> T:
        """Try `call`, which may safely be repeated, until it is answered or `patience` is at its end.

        `call` gets the seconds that it may take. Raises the last CallFailed.
        """
        pauses = Pauses(patience)
        while True:
            try:
                return await call(pauses.left)
            except CallFailed as failure:
                if not failure.passing or not await pauses.pause():
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
            raise CallFailed("UNAVAILABLE", "the keep-alive stream ended without an answer", unanswered=True)

        return await self._logged_in(first_answer)

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
                raise CallFailed("DEADLINE_EXCEEDED", "etcd did not begin to watch", unanswered=True) from None
            except BaseException:
                stream.close()
                raise
            return stream

        return await self._logged_in(begin)

    async def status(self) -> Status:
        """How the member that answers is. Raises CallFailed."""
        answer = await self._call(lambda: self._client.maintenancestub.Status, rpc.StatusRequest())
        trouble = [str(error) for error in answer.errors] or ([] if answer.leader else ["etcd has no leader"])
        return Status(version=str(answer.version), trouble="; ".join(trouble))

    async def _call(self, method: Callable[[], Message], request: Message, timeout: float | None = None) -> Message:
        limit = self._timeout if timeout is None else min(timeout, self._timeout)

        async def once() -> Message:
            return await method()(request, timeout=limit, metadata=self._client.metadata)

        return await self._logged_in(once)

    async def _logged_in(self, call: Callable[[], Awaitable[T]]) -> T:
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
            raise CallFailed("CANCELLED", "this daemon has closed its connection", unanswered=True)
        try:
            yield
        except grpc.aio.AioRpcError as error:
            code, detail = error.code(), error.details() or "no details"
            raise CallFailed(code.name, detail, unanswered=code in _UNANSWERED) from None
        except grpc.aio.UsageError as error:
            raise CallFailed("CANCELLED", str(error), unanswered=True) from None
        except asyncio.CancelledError:
            # grpc ends calls on a channel that is being closed in the same way as those of a cancelled task.
            task = asyncio.current_task()
            if not self._usable.is_set() and task is not None and not task.cancelling():
                raise CallFailed("CANCELLED", "this daemon has closed its connection", unanswered=True) from None
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
            raise CallFailed("PERMISSION_DENIED", answer.refusal, unanswered=False)

    async def read(self) -> WatchAnswer:
        """The next message. Cancelling it ends the watch. Raises CallFailed."""
        async with self._mapped_errors():
            answer = await self._call.read()
        if answer is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in its stubs
            raise CallFailed("UNAVAILABLE", "etcd ended the watch", unanswered=True)
        return watch_answer(answer)

    def close(self) -> None:
        """End it; may be repeated."""
        self._call.cancel()


class Pauses:
    """Growing pauses between tries, until `patience` is at its end."""

    def __init__(self, patience: timedelta) -> None:
        self._until = asyncio.get_running_loop().time() + patience.total_seconds()
        self._next = _FIRST_PAUSE_SECONDS

    @property
    def left(self) -> float:
        """Seconds until the end; never quite 0, so that a call always gets a chance."""
        return max(self._until - asyncio.get_running_loop().time(), 0.001)

    async def pause(self) -> bool:
        """Wait a little. False, at once, when another try would come too late."""
        if asyncio.get_running_loop().time() + self._next >= self._until:
            return False
        await asyncio.sleep(self._next)
        self._next = min(self._next * 2, _LONGEST_PAUSE_SECONDS)
        return True
