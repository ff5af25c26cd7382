"""ContainerService: converts each request, calls core, and converts the result."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from gpudock.v1 import (
    container_revision_pb2,
    container_service_pb2,
    exec_pb2,
    operation_pb2,
)
from gpudock.v1.container_service_pb2_grpc import ContainerServiceServicer
from typing_extensions import override

from gpudock_server import tokens
from gpudock_server.core.containers.commands import Command
from gpudock_server.core.containers.service import Containers
from gpudock_server.core.exec.sessions import ExecSessions
from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.watches import Watches
from gpudock_server.ports import ContainerView, Page, RevisionView
from gpudock_server.rpc import list_requests, pagination, watch_requests
from gpudock_server.rpc.containers import commit_request
from gpudock_server.rpc.containers import requests as validation
from gpudock_server.rpc.containers.messages import container_message, container_view_message
from gpudock_server.rpc.containers.revision_messages import container_revision_message
from gpudock_server.rpc.exec.call import serve_exec
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.operations import stream
from gpudock_server.rpc.operations.request_key import MutationRequest, request_key
from gpudock_server.rpc.watch_stream import watch_stream

SERVICE = container_service_pb2.DESCRIPTOR.services_by_name["ContainerService"].full_name

R_co = TypeVar("R_co", covariant=True)


class _OperationRequest(MutationRequest, Protocol):
    """A request that starts an operation, or only plans it."""

    @property
    def validate_only(self) -> bool:
        """Whether to return the plan only."""
        ...


class _ResponseType(Protocol[R_co]):
    """The class of a response that holds an operation or its result."""

    def __call__(
        self,
        *,
        operation: operation_pb2.Operation | None = None,
        result: Any = None,  # noqa: ANN401 - each response class takes the result type of its own RPC
    ) -> R_co:
        """Create a response."""
        ...


class ContainerService(ContainerServiceServicer):
    """Serves gpudock.v1.ContainerService.

    The streaming methods return a generator instead of being one, so that a request is checked when the method is
    called. grpc.aio does not support that; `interceptor.wrap`, which wraps all methods of this server, does.
    """

    def __init__(self, containers: Containers, operations: Operations, execs: ExecSessions, watches: Watches) -> None:
        self._containers = containers
        self._watches = watches
        self._operations = operations
        self._execs = execs

    @override
    def CreateContainer(
        self, request: container_service_pb2.CreateContainerRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.CreateContainerResponse]:
        command = validation.create(request, self._containers.host)
        return self._operate("CreateContainer", request, command, container_service_pb2.CreateContainerResponse)

    @override
    async def GetContainer(
        self, request: container_service_pb2.GetContainerRequest, context: Context
    ) -> container_service_pb2.GetContainerResponse:
        view = await self._containers.get(validation.get(request))
        return container_service_pb2.GetContainerResponse(container=container_view_message(view))

    @override
    async def ListContainers(
        self, request: container_service_pb2.ListContainersRequest, context: Context
    ) -> container_service_pb2.ListContainersResponse:
        watch_token = ""

        async def read(page_size: int, page_token: str) -> Page[ContainerView]:
            nonlocal watch_token
            found = await self._containers.list(page_size=page_size, page_token=page_token)
            watch_token = found.watch_token
            return found

        found, token = await pagination.from_store(list_requests.containers(request), read, container_view_message)
        return container_service_pb2.ListContainersResponse(
            containers=found,
            next_page_token=token,
            resume_token=tokens.encode_token(watch_requests.container_scope(request.filter), watch_token),
        )

    @override
    def WatchContainers(
        self, request: container_service_pb2.WatchContainersRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.WatchContainersResponse]:
        watch_request = watch_requests.containers(request)
        watch = self._watches.containers(
            watch_request.matches, token=watch_request.resume, listing=watch_request.listing
        )
        return watch_stream(watch_request, watch, container_view_message, container_service_pb2.WatchContainersResponse)

    @override
    def StartContainer(
        self, request: container_service_pb2.StartContainerRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.StartContainerResponse]:
        command = validation.start(request)
        return self._operate("StartContainer", request, command, container_service_pb2.StartContainerResponse)

    @override
    async def StopContainer(
        self, request: container_service_pb2.StopContainerRequest, context: Context
    ) -> container_service_pb2.StopContainerResponse:
        stopped = await self._containers.run(validation.stop(request), _key("StopContainer", request))
        return container_service_pb2.StopContainerResponse(container=container_message(stopped))

    @override
    def RestartContainer(
        self, request: container_service_pb2.RestartContainerRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.RestartContainerResponse]:
        command = validation.restart(request)
        return self._operate("RestartContainer", request, command, container_service_pb2.RestartContainerResponse)

    @override
    async def PauseContainer(
        self, request: container_service_pb2.PauseContainerRequest, context: Context
    ) -> container_service_pb2.PauseContainerResponse:
        paused = await self._containers.run(validation.pause(request), _key("PauseContainer", request))
        return container_service_pb2.PauseContainerResponse(container=container_message(paused))

    @override
    async def UnpauseContainer(
        self, request: container_service_pb2.UnpauseContainerRequest, context: Context
    ) -> container_service_pb2.UnpauseContainerResponse:
        unpaused = await self._containers.run(validation.unpause(request), _key("UnpauseContainer", request))
        return container_service_pb2.UnpauseContainerResponse(container=container_message(unpaused))

    @override
    async def DeleteContainer(
        self, request: container_service_pb2.DeleteContainerRequest, context: Context
    ) -> container_service_pb2.DeleteContainerResponse:
        await self._containers.run_to_end(validation.delete(request), _key("DeleteContainer", request))
        return container_service_pb2.DeleteContainerResponse()

    @override
    def ScaleContainer(
        self, request: container_service_pb2.ScaleContainerRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.ScaleContainerResponse]:
        command = validation.scale(request, self._containers.host)
        return self._operate("ScaleContainer", request, command, container_service_pb2.ScaleContainerResponse)

    @override
    def UpdateContainer(
        self, request: container_service_pb2.UpdateContainerRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.UpdateContainerResponse]:
        command = validation.update(request, self._containers.host)
        return self._operate("UpdateContainer", request, command, container_service_pb2.UpdateContainerResponse)

    @override
    def RollbackContainer(
        self, request: container_service_pb2.RollbackContainerRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.RollbackContainerResponse]:
        command = validation.rollback(request)
        return self._operate("RollbackContainer", request, command, container_service_pb2.RollbackContainerResponse)

    @override
    def CloneContainer(
        self, request: container_service_pb2.CloneContainerRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.CloneContainerResponse]:
        command = validation.clone(request, self._containers.host)
        return self._operate("CloneContainer", request, command, container_service_pb2.CloneContainerResponse)

    @override
    async def GetContainerRevision(
        self, request: container_service_pb2.GetContainerRevisionRequest, context: Context
    ) -> container_service_pb2.GetContainerRevisionResponse:
        name, number = validation.get_revision(request)
        container, view = await self._containers.revision(name, number)
        return container_service_pb2.GetContainerRevisionResponse(
            revision=container_revision_message(view, container.revision)
        )

    @override
    async def ListContainerRevisions(
        self, request: container_service_pb2.ListContainerRevisionsRequest, context: Context
    ) -> container_service_pb2.ListContainerRevisionsResponse:
        list_request = list_requests.revisions(request)
        container = (await self._containers.get(request.name)).container

        async def read(page_size: int, page_token: str) -> Page[RevisionView]:
            return await self._containers.revisions(container.uid, page_size=page_size, page_token=page_token)

        def message(view: RevisionView) -> container_revision_pb2.ContainerRevision:
            return container_revision_message(view, container.revision)

        found, token = await pagination.from_store(list_request, read, message)
        return container_service_pb2.ListContainerRevisionsResponse(revisions=found, next_page_token=token)

    @override
    async def DeleteContainerRevision(
        self, request: container_service_pb2.DeleteContainerRevisionRequest, context: Context
    ) -> container_service_pb2.DeleteContainerRevisionResponse:
        await self._containers.run_to_end(validation.delete_revision(request), _key("DeleteContainerRevision", request))
        return container_service_pb2.DeleteContainerRevisionResponse()

    @override
    def CommitContainer(
        self, request: container_service_pb2.CommitContainerRequest, context: Context
    ) -> AsyncIterator[container_service_pb2.CommitContainerResponse]:
        command = commit_request.commit(request)
        return self._operate("CommitContainer", request, command, container_service_pb2.CommitContainerResponse)

    @override
    async def ExecContainer(  # type: ignore[override]  # it writes its responses: see serve_exec
        self, request_iterator: AsyncIterator[exec_pb2.ExecContainerRequest], context: Context
    ) -> None:
        await serve_exec(self._execs, request_iterator, context)

    async def _operate(
        self, method: str, request: _OperationRequest, command: Command, event: _ResponseType[R_co]
    ) -> AsyncIterator[R_co]:
        """Stream the plan, or the operation until it ends. Disconnecting does not cancel the operation."""
        if request.validate_only:
            yield event(operation=stream.record_message(await self._containers.preview(command)))
            return
        operation_id = await self._containers.begin(command, _key(method, request))
        async with aclosing(stream.follow(self._operations, operation_id)) as messages:
            async for message in messages:
                if isinstance(message, operation_pb2.Operation):
                    yield event(operation=message)
                else:
                    yield event(result=message)


def _key(method: str, request: MutationRequest) -> RequestKey | None:
    return request_key(f"/{SERVICE}/{method}", request)
