"""Calls on a channel: their metadata and deadline, errors as exceptions, and repetition after UNAVAILABLE.

To repeat is safe by contract: what changes nothing may be asked again, and a mutation carries a `request_id`, under
which the server answers a second call with the outcome of the first.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import dataclass
from typing import TypeVar

import grpc.aio

from gpudock.errors import GpudockError, Unavailable, error_of

Q = TypeVar("Q")
R = TypeVar("R")

_FIRST_DELAY = 0.1
_LONGEST_DELAY = 3.0


class Backoff:
    """How long a failing call is made again: after growing delays with jitter, `seconds` from the first failure."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failures = 0
        self._deadline = 0.0

    async def wait(self, error: GpudockError) -> None:
        """Sleep until the next try, not shorter than the server asked for; raises `error` if that would be too late."""
        now = time.monotonic()
        if self._failures == 0:
            self._deadline = now + self._seconds
        bound = min(_FIRST_DELAY * 2**self._failures, _LONGEST_DELAY)
        delay = max(random.uniform(bound / 2, bound), error.retry_after or 0.0)  # noqa: S311 - spreads load, no secret
        self._failures += 1
        if now + delay > self._deadline:
            self._failures = 0
            raise error
        await asyncio.sleep(delay)


@dataclass(frozen=True, slots=True)
class Calls:
    """What every call of a client has in common. Times in seconds."""

    metadata: tuple[tuple[str, str], ...]
    timeout: float
    retry_for: float
    reattach_for: float

    async def read(self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q) -> R:
        """Ask what changes nothing."""
        return await self._call_with_retries(method, request, self.timeout)

    async def change(self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q) -> R:
        """Make a mutation whose request has a `request_id`. It has no deadline: to stop takes as long as it takes."""
        return await self._call_with_retries(method, request, None)

    async def _call_with_retries(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> R:
        backoff = Backoff(self.retry_for)
        while True:
            try:
                return await method(request, timeout=timeout, metadata=self.metadata)
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure)
                if not isinstance(error, Unavailable):
                    raise error from failure
            await backoff.wait(error)

    def stream(self, method: grpc.aio.UnaryStreamMultiCallable[Q, R], request: Q) -> grpc.aio.UnaryStreamCall[Q, R]:
        """Begin a stream of answers. It has no deadline."""
        return method(request, metadata=self.metadata)

    def bidi_stream(self, method: grpc.aio.StreamStreamMultiCallable[Q, R]) -> grpc.aio.StreamStreamCall[Q, R]:
        """Begin a stream in both directions. It has no deadline."""
        return method(None, metadata=self.metadata)


def request_id_or_new(given: str | None) -> str:
    """The id that the caller chose, or a new one."""
    return given or str(uuid.uuid4())
