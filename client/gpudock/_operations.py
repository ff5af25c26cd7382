"""Operations: work on the server that a client watches, and reattaches to after a lost connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from typing import Any, Generic, TypeVar, cast

import grpc
import grpc.aio

from gpudock._calls import Backoff, Calls, ReopenedStream, Stream, request_id_or_new
from gpudock._enums import enum_value
from gpudock._pages import Pages
from gpudock.errors import GpudockError, Unavailable
from gpudock.v1 import operation_pb2 as pb
from gpudock.v1 import operation_service_pb2 as service
from gpudock.v1.committed_image_pb2 import CommittedImage
from gpudock.v1.container_pb2 import Container
from gpudock.v1.operation_service_pb2_grpc import OperationServiceStub
from gpudock.v1.volume_pb2 import Volume

T = TypeVar("T")

# The codes of a lost connection, where the status did not come from the server.
CONNECTION_LOST_CODES = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
)
_FAILED_STATES = frozenset({pb.OPERATION_STATE_FAILED, pb.OPERATION_STATE_CANCELLED})


class OperationCall(Generic[T]):
    """A call that begins or watches an operation. Nothing is sent before it is awaited, iterated or `started`.

    `await call` returns the result. `async for snapshot in call` yields each change of the Operation; `await call` then
    returns at once. Both raise the GpudockError that the operation ended with. After a lost connection the call
    reattaches; if that fails for too long, it raises Unavailable and may be awaited or iterated again. Cancelling the
    task or calling `aclose` does not cancel the operation; `cancel` does.
    """

    def __init__(
        self,
        operations: Operations,
        *,
        begin: Callable[[], Stream] | None = None,
        operation_id: str = "",
        validate_only: bool = False,
        resource: Callable[[Any], T],
    ) -> None:
        """`begin` calls the RPC of the operation; without it, `operation_id` is watched. `resource` reads results.

        The responses of each such RPC have `oneof event { Operation operation; <Result> result; }`.
        """
        self._operations = operations
        self._begin = begin
        self._resource = resource
        self._validate_only = validate_only
        # Before the operation is known, there is nothing to reattach to: retry like any other call.
        self._backoff = Backoff(operations.calls.retry_for)
        self._reading = asyncio.Lock()
        self._stream = ReopenedStream(self._open)
        self._unread: deque[pb.Operation] = deque()
        self._ended = False
        self._result: T | None = None
        self._error: GpudockError | None = None
        self.operation_id: str = operation_id
        """The id of the operation; empty until the server has answered."""
        self.snapshot: pb.Operation | None = None
        """The newest snapshot; None until the server has answered."""

    def __aiter__(self) -> AsyncIterator[pb.Operation]:
        return self

    async def __anext__(self) -> pb.Operation:
        async with self._reading:
            snapshot = self._unread.popleft() if self._unread else await self._next()
        if snapshot is None:
            raise StopAsyncIteration
        return snapshot

    def __await__(self) -> Generator[Any, None, T]:
        return self.result().__await__()

    async def result(self) -> T:
        """Wait for the end of the operation and return what it created or changed."""
        if self._validate_only:
            raise ValueError("validate_only calls have no result; await `plan()` instead")
        async for _ in self:
            pass
        return cast("T", self._result)

    async def started(self) -> str:
        """Return the id of the operation once it is recorded; from then on it continues without the caller."""
        if not self.operation_id:
            await self._first()
        return self.operation_id

    async def plan(self) -> pb.OperationPlan:
        """Return what the operation will do; the only response with `validate_only`."""
        return (self.snapshot or await self._first()).plan

    async def cancel(self) -> pb.Operation:
        """Request the cancellation of the operation; returns once the request is recorded.

        The operation then undoes its changes; awaiting the result raises Cancelled when it has.

        Raises:
            PreconditionFailed: the operation can no longer be cancelled (OPERATION_NOT_CANCELLABLE).
        """
        return await self._operations.cancel(await self.started())

    async def aclose(self) -> None:
        """Stop watching. The operation continues."""
        self._stream.drop()
        self._ended = True

    async def _first(self) -> pb.Operation:
        """Return the first snapshot, which the iteration yields as well."""
        async with self._reading:
            while self.snapshot is None:
                snapshot = await self._next()
                if snapshot is None:
                    raise ValueError("the call ended before the server sent an operation")
                self._unread.append(snapshot)
        return self.snapshot

    async def _next(self) -> pb.Operation | None:
        """Return the next snapshot that differs from the last one; None after the end."""
        while not self._ended:
            try:
                event = await self._event()
            except GpudockError as error:
                self._stream.drop()
                if not self._is_lost(error):
                    self._ended, self._error = True, error
                    raise
                await self._backoff.wait(error)
                continue
            snapshot = await self._handle_event(event)
            if snapshot is not None:
                return snapshot
        if self._error is not None:
            raise self._error
        return None

    async def _handle_event(self, event: Any) -> pb.Operation | None:  # noqa: ANN401 - a message of any operation's RPC
        """Return the snapshot of an event if it is new; store the result of an event that has one."""
        match event.WhichOneof("event"):
            case "operation" if event.operation != self.snapshot:
                # Reset the retries on a new snapshot only: a server might answer and disconnect again and again.
                self._backoff = Backoff(self._operations.calls.reattach_for)
                self.snapshot = cast("pb.Operation", event.operation)
                self.operation_id = self.snapshot.id
                return self.snapshot
            case "result":
                self._ended, self._result = True, self._resource(event.result)
                await self._read_to_end()
            case _:
                pass
        return None

    async def _event(self) -> Any:  # noqa: ANN401 - a message of any operation's RPC
        event = await self._stream.read()
        if event is not None:
            return event
        if self._validate_only and self.snapshot is not None:
            self._ended = True
            return service.WatchOperationResponse()
        raise Unavailable("the stream ended before the operation did", code=grpc.StatusCode.UNAVAILABLE)

    async def _read_to_end(self) -> None:
        """Wait until the server ends the stream; cancelling it would look like a client that disconnected."""
        with contextlib.suppress(GpudockError):
            await self._event()
        self._stream.drop()

    def _open(self) -> Stream:
        if self._begin is not None and not self.operation_id:
            return self._begin()
        return self._operations.attach(self.operation_id)

    def _is_lost(self, error: GpudockError) -> bool:
        """Return whether the connection failed and not the operation."""
        if not error.answered:
            return error.code in CONNECTION_LOST_CODES
        if not isinstance(error, Unavailable):
            return False
        last = self.snapshot
        return last is None or last.state not in _FAILED_STATES or last.error.reason != error.reason


class Operations:
    """The operations of the installation: the running ones, and the ended ones for as long as the daemon keeps them."""

    def __init__(self, calls: Calls, channel: grpc.aio.Channel) -> None:
        self.calls = calls
        self._stub = OperationServiceStub(channel)

    def begin(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Any, Any],
        request: Any,  # noqa: ANN401 - a message of any operation's RPC
        resource: Callable[[Any], T],
    ) -> OperationCall[T]:
        """Return the call of an RPC that begins an operation; `resource` reads its result."""
        return OperationCall(
            self,
            begin=lambda: self.calls.stream(method, request),
            validate_only=request.validate_only,
            resource=resource,
        )

    async def get(self, operation_id: str) -> pb.Operation:
        """Return an operation. Raises NotFound if the id is unknown or the operation is no longer kept."""
        answer = await self.calls.read(self._stub.GetOperation, service.GetOperationRequest(id=operation_id))
        return answer.operation

    def list(
        self,
        *,
        states: Iterable[str] = (),
        kinds: Iterable[str] = (),
        container: str = "",
        node: str = "",
        page_size: int = 0,
    ) -> Pages[pb.Operation]:
        """List operations, newest first: in any of `states` (`running`), of any of `kinds` (`scale-container`)."""
        filters = service.OperationFilter(
            states=[enum_value(pb.OperationState, state) for state in states],
            kinds=[enum_value(pb.OperationKind, kind) for kind in kinds],
            node=node,
        )
        if container:
            filters.target.CopyFrom(pb.ResourceRef(kind=pb.RESOURCE_KIND_CONTAINER, name=container))
        request = service.ListOperationsRequest(page_size=page_size, filter=filters)
        return Pages(self.calls, self._stub.ListOperations, request, lambda answer: answer.operations)

    def watch(self, operation_id: str) -> OperationCall[Container | CommittedImage | Volume | None]:
        """Watch an operation; the result is that of its own RPC, or None for an operation without one."""
        return OperationCall(self, operation_id=operation_id, resource=result_resource)

    async def cancel(self, operation_id: str, *, request_id: str | None = None) -> pb.Operation:
        """Request the cancellation of an operation; returns once the request is recorded.

        Raises:
            PreconditionFailed: the operation has ended or can no longer be undone (OPERATION_NOT_CANCELLABLE).
        """
        request = service.CancelOperationRequest(id=operation_id, request_id=request_id_or_new(request_id))
        return (await self.calls.change(self._stub.CancelOperation, request)).operation

    def attach(self, operation_id: str) -> Stream:
        """Open the stream of WatchOperation."""
        return self.calls.stream(self._stub.WatchOperation, service.WatchOperationRequest(id=operation_id))


def result_resource(result: service.OperationResult) -> Container | CommittedImage | Volume | None:
    """Return the resource in a result of WatchOperation."""
    kind = result.WhichOneof("resource")
    return getattr(result, kind) if kind else None
