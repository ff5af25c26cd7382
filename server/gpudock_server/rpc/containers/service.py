"""ContainerService: converts each request, calls core, and converts the result."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import TypeVar

from gpudock.v1 import container_revision_pb2, exec_pb2
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1.container_service_pb2_grpc import ContainerServiceServicer
from typing_extensions import override

from gpudock_server import tokens
from gpudock_server.core.containers.commands import Command
from gpudock_server.core.containers.service import Containers
from gpudock_server.core.exec.sessions import ExecSessions
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.watches import Watches
from gpudock_server.ports import RevisionView
from gpudock_server.rpc import list_requests, pagination, watch_requests
from gpudock_server.rpc.containers import commit_request
from gpudock_server.rpc.containers import requests as validation
from gpudock_server.rpc.containers.messages import (
    container_message,
    container_revision_message,
    container_view_message,
)
from gpudock_server.rpc.exec.call import serve_exec
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.operations import stream
from gpudock_server.rpc.operations.request_key import OperationRequest, request_key
from gpudock_server.rpc.watch_stream import watch_stream

SERVICE = pb.DESCRIPTOR.services_by_name["ContainerService"].full_name

R = TypeVar("R")


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
        self, request: pb.CreateContainerRequest, context: Context
    ) -> AsyncIterator[pb.CreateContainerResponse]:
        command = validation.create(request, self._containers.host)
        return self._operate(request, command, pb.CreateContainerResponse)

    @override
    async def GetContainer(self, request: pb.GetContainerRequest, context: Context) -> pb.GetContainerResponse:
        view = await self._containers.get(validation.get(request))
        return pb.GetContainerResponse(container=container_view_message(view))

    @override
    async def ListContainers(self, request: pb.ListContainersRequest, context: Context) -> pb.ListContainersResponse:
        page = await pagination.from_store(
            list_requests.containers(request), self._containers.list, container_view_message
        )
        return pb.ListContainersResponse(
            containers=page.messages,
            next_page_token=page.next_token,
            resume_token=tokens.encode_token(watch_requests.container_scope(request.filter), page.watch_position),
        )

    @override
    def WatchContainers(
        self, request: pb.WatchContainersRequest, context: Context
    ) -> AsyncIterator[pb.WatchContainersResponse]:
        watch_request = watch_requests.containers(request)
        watch = self._watches.containers(
            watch_request.matches, token=watch_request.resume, listing=watch_request.listing
        )
        return watch_stream(watch_request, watch, container_view_message, pb.WatchContainersResponse)

    @override
    def StartContainer(
        self, request: pb.StartContainerRequest, context: Context
    ) -> AsyncIterator[pb.StartContainerResponse]:
        command = validation.start(request)
        return self._operate(request, command, pb.StartContainerResponse)

    @override
    async def StopContainer(self, request: pb.StopContainerRequest, context: Context) -> pb.StopContainerResponse:
        stopped = await self._containers.run(validation.stop(request), request_key(request))
        return pb.StopContainerResponse(container=container_message(stopped))

    @override
    def RestartContainer(
        self, request: pb.RestartContainerRequest, context: Context
    ) -> AsyncIterator[pb.RestartContainerResponse]:
        command = validation.restart(request)
        return self._operate(request, command, pb.RestartContainerResponse)

    @override
    async def PauseContainer(self, request: pb.PauseContainerRequest, context: Context) -> pb.PauseContainerResponse:
        paused = await self._containers.run(validation.pause(request), request_key(request))
        return pb.PauseContainerResponse(container=container_message(paused))

    @override
    async def UnpauseContainer(
        self, request: pb.UnpauseContainerRequest, context: Context
    ) -> pb.UnpauseContainerResponse:
        unpaused = await self._containers.run(validation.unpause(request), request_key(request))
        return pb.UnpauseContainerResponse(container=container_message(unpaused))

    @override
    async def DeleteContainer(self, request: pb.DeleteContainerRequest, context: Context) -> pb.DeleteContainerResponse:
        await self._containers.run_to_end(validation.delete(request), request_key(request))
        return pb.DeleteContainerResponse()

    @override
    def ScaleContainer(
        self, request: pb.ScaleContainerRequest, context: Context
    ) -> AsyncIterator[pb.ScaleContainerResponse]:
        command = validation.scale(request, self._containers.host)
        return self._operate(request, command, pb.ScaleContainerResponse)

    @override
    def UpdateContainer(
        self, request: pb.UpdateContainerRequest, context: Context
    ) -> AsyncIterator[pb.UpdateContainerResponse]:
        command = validation.update(request, self._containers.host)
        return self._operate(request, command, pb.UpdateContainerResponse)

    @override
    def RollbackContainer(
        self, request: pb.RollbackContainerRequest, context: Context
    ) -> AsyncIterator[pb.RollbackContainerResponse]:
        command = validation.rollback(request)
        return self._operate(request, command, pb.RollbackContainerResponse)

    @override
    def CloneContainer(
        self, request: pb.CloneContainerRequest, context: Context
    ) -> AsyncIterator[pb.CloneContainerResponse]:
        command = validation.clone(request, self._containers.host)
        return self._operate(request, command, pb.CloneContainerResponse)

    @override
    async def GetContainerRevision(
        self, request: pb.GetContainerRevisionRequest, context: Context
    ) -> pb.GetContainerRevisionResponse:
        name, number = validation.get_revision(request)
        container, view = await self._containers.revision(name, number)
        return pb.GetContainerRevisionResponse(revision=container_revision_message(view, container.revision))

    @override
    async def ListContainerRevisions(
        self, request: pb.ListContainerRevisionsRequest, context: Context
    ) -> pb.ListContainerRevisionsResponse:
        list_request = list_requests.revisions(request)
        container = (await self._containers.get(request.name)).container

        def message(view: RevisionView) -> container_revision_pb2.ContainerRevision:
            return container_revision_message(view, container.revision)

        page = await pagination.from_store(list_request, partial(self._containers.revisions, container.uid), message)
        return pb.ListContainerRevisionsResponse(revisions=page.messages, next_page_token=page.next_token)

    @override
    async def DeleteContainerRevision(
        self, request: pb.DeleteContainerRevisionRequest, context: Context
    ) -> pb.DeleteContainerRevisionResponse:
        await self._containers.run_to_end(validation.delete_revision(request), request_key(request))
        return pb.DeleteContainerRevisionResponse()

    @override
    def CommitContainer(
        self, request: pb.CommitContainerRequest, context: Context
    ) -> AsyncIterator[pb.CommitContainerResponse]:
        command = commit_request.commit(request)
        return self._operate(request, command, pb.CommitContainerResponse)

    @override
    async def ExecContainer(  # type: ignore[override]  # it writes its responses: see serve_exec
        self, request_iterator: AsyncIterator[exec_pb2.ExecContainerRequest], context: Context
    ) -> None:
        await serve_exec(self._execs, request_iterator, context)

    def _operate(
        self, request: OperationRequest, command: Command, response: stream.OperationResponse[R]
    ) -> AsyncIterator[R]:
        return stream.operate(self._containers, self._operations, request, command, response)
