"""Unary and streaming calls with metadata, deadlines and retries; errors become exceptions.

A retry after UNAVAILABLE is safe by contract: a read changes nothing, and the server answers a mutation that is
repeated under the same `request_id` with the outcome of the first call.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc.aio

from gpudock.errors import GpudockError, Unavailable, error_of

Q = TypeVar("Q")
R = TypeVar("R")

Stream: TypeAlias = "grpc.aio.UnaryStreamCall[Any, Any]"

_FIRST_DELAY = 0.1
_LONGEST_DELAY = 3.0


class Backoff:
    """Growing delays with jitter between retries, until `seconds` after the first failure."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failures = 0
        self._deadline = 0.0

    async def wait(self, error: GpudockError) -> None:
        """Sleep until the next retry, at least `error.retry_after` seconds; raise `error` if that is too late."""
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


class ReopenedStream:
    """A stream of responses that is opened by `read`, and opened again after `drop`."""

    def __init__(self, open_stream: Callable[[], Stream]) -> None:
        self._open = open_stream
        self._stream: Stream | None = None

    async def read(self) -> Any:  # noqa: ANN401 - a message of any RPC with a `oneof event`
        """Return the next response; None at the end of the stream. Raises GpudockError."""
        if self._stream is None:
            self._stream = self._open()
        try:
            response = await self._stream.read()
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure
        except asyncio.CancelledError:
            # gRPC ends the stream with the cancelled read; a later read, for instance after a timeout, opens a new one.
            self.drop()
            raise
        return response if hasattr(response, "WhichOneof") else None

    def drop(self) -> None:
        """End the stream."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None


@dataclass(frozen=True, slots=True)
class Calls:
    """The settings of all calls of a client; times in seconds."""

    metadata: tuple[tuple[str, str], ...]
    timeout: float
    retry_for: float
    reattach_for: float

    async def read(self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q) -> R:
        """Call an RPC that changes nothing, with the deadline of `timeout`."""
        return await self._call_with_retries(method, request, self.timeout)

    async def change(self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q) -> R:
        """Call a mutation whose request has a `request_id`. There is no deadline: a stop may take any time."""
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
        """Open a stream of responses, without a deadline."""
        return method(request, metadata=self.metadata)

    def bidi_stream(self, method: grpc.aio.StreamStreamMultiCallable[Q, R]) -> grpc.aio.StreamStreamCall[Q, R]:
        """Open a stream in both directions, without a deadline."""
        return method(None, metadata=self.metadata)


def request_id_or_new(given: str | None) -> str:
    """Return the id that the caller gave, or a new one."""
    return given or str(uuid.uuid4())
