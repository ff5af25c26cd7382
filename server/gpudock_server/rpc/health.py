"""grpc.health.v1.Health: the serving status of each service. Callers need no authentication.

The servicer of grpcio-health-checking is not used. It holds a lock while it writes to a watcher, so that a watcher that
stops reading blocks all status changes, and it limits neither watchers nor the length of names.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typing_extensions import override

from gpudock_server.errors import FieldViolation, HealthWatchLimit, InvalidArgument
from gpudock_server.rpc.middleware.identity import CallerKind, caller
from gpudock_server.rpc.middleware.interceptor import Context

# Open watches of unauthenticated callers, over all connections. Each takes about 30 kB; a load balancer needs one.
MAX_ANONYMOUS_WATCHES = 256
_MAX_NAME_CHARACTERS = 256

_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its package ships no types
    """Serves the statuses that `set` has set. The service named "" is the server as a whole."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": health_pb2.HealthCheckResponse.SERVING}
        self._changed = asyncio.Event()
        self._anonymous = 0

    def set(self, service: str, status: int) -> None:
        """Set the status of a service. Each watcher receives it when it next reads."""
        self._statuses[service] = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @override
    async def Check(self, request: Any, context: Context) -> Any:
        """See health.proto."""
        status = self._statuses.get(request.service)
        if status is None:
            # health.proto asks for NOT_FOUND; an error of ours would add details that it does not define.
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=status)

    @override
    async def Watch(self, request: Any, context: Context) -> None:
        """See health.proto."""
        if len(request.service) > _MAX_NAME_CHARACTERS:
            raise InvalidArgument((FieldViolation("service", f"must have at most {_MAX_NAME_CHARACTERS} characters"),))
        if caller().kind is not CallerKind.ANONYMOUS:
            await self._watch(request.service, context)
            return
        if self._anonymous >= MAX_ANONYMOUS_WATCHES:
            raise HealthWatchLimit(limit=MAX_ANONYMOUS_WATCHES)
        self._anonymous += 1
        try:
            await self._watch(request.service, context)
        finally:
            self._anonymous -= 1

    async def _watch(self, service: str, context: Context) -> None:
        sent: int | None = None
        while True:
            # Taken before the status is read, so that a change during the write is not missed.
            changed = self._changed
            status = self._statuses.get(service, _UNKNOWN)
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            await changed.wait()
