"""A caller that hangs up while it is being answered is a cancelled call, and no fault of the server.

grpc tells of it twice: the message that is being sent fails, with an error of grpc's own, and a moment later the task
of the call is cancelled. Whoever is around a call is to see the second only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
from typing_extensions import override

from gpudock_server.rpc.middleware.interceptor import Call, Interceptor

# Ample: the one follows the other at once. After it, the error is what it seems to be.
_CANCELLATION_SECONDS = 1.0


class DisconnectInterceptor(Interceptor):
    """Goes inside of those that look at how a call ends."""

    @override
    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            if _is_send_failure(error):
                if _task_is_cancelled():
                    # While a task group that had failed waited for its tasks: it keeps that to itself.
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
