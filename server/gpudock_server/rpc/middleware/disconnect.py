"""Treats a disconnect of the caller during a write as a cancelled call, not as an error of the server.

grpc reports such a disconnect twice: the write fails with an error of grpc, and a moment later the task of the call is
cancelled. The outer interceptors see the cancellation only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
from typing_extensions import override

from gpudock_server.rpc.middleware.interceptor import Call, Interceptor

# The cancellation follows at once. After this time without one, the error is not a disconnect.
_CANCELLATION_SECONDS = 1.0


class DisconnectInterceptor(Interceptor):
    """Replaces the error of a write to a disconnected caller by the cancellation of the call."""

    @override
    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            if _is_send_failure(error):
                if _task_is_cancelled():
                    # A task group that has failed swallows a cancellation that comes while it waits for its tasks.
                    raise asyncio.CancelledError from error
                await asyncio.sleep(_CANCELLATION_SECONDS)
            raise


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _is_send_failure(error: Exception) -> bool:
    if isinstance(error, ExceptionGroup):
        return error.subgroup(grpc.aio.InternalError) is not None
    return isinstance(error, grpc.aio.InternalError)
