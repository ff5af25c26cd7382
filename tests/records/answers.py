"""The answers of a daemon to every RPC that reads records.

Messages are protobuf's JSON, with enums as numbers, because names of enum values may change. Values that are measured
at the time of the call, and tokens, are left out.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from gpudock.v1 import (
    container_service_pb2,
    node_service_pb2,
    operation_pb2,
    operation_service_pb2,
    volume_service_pb2,
)

from tests.calls import Caller

_TOKENS = ("resume_token", "next_page_token")
_MOST = 1000
_ENDED = (
    operation_pb2.OPERATION_STATE_SUCCEEDED,
    operation_pb2.OPERATION_STATE_FAILED,
    operation_pb2.OPERATION_STATE_CANCELLED,
)


async def answers_of(caller: Caller) -> dict[str, Any]:
    """All answers, by RPC and argument."""
    listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest(page_size=_MOST))
    answers = {}
    for container in listed.containers:
        name = container.name
        assert await caller.get(name) == container
        answers[f"GetContainer {name}"] = message_json(container)
        revisions = await caller.revisions(name)
        answers[f"ListContainerRevisions {name}"] = [message_json(revision) for revision in revisions]
        for revision in revisions:
            request = container_service_pb2.GetContainerRevisionRequest(name=name, revision=revision.revision)
            answer = await caller.containers.GetContainerRevision(request)
            assert answer.revision == revision
    answers |= await _volumes(caller)
    answers |= await _operations(caller)
    answers["holders of cards"] = await caller.holders()
    ports = await caller.nodes.ListPorts(node_service_pb2.ListPortsRequest(page_size=_MOST))
    answers["ListPorts"] = [message_json(port) for port in ports.ports]
    return answers


async def _volumes(caller: Caller) -> dict[str, Any]:
    answers = {}
    listed = await caller.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest(page_size=_MOST))
    for volume in listed.volumes:
        got = await caller.volume(volume.name)
        for message in (volume, got):
            message.ClearField("used_bytes")
        assert got == volume
        answers[f"GetVolume {volume.name}"] = message_json(got)
        request = volume_service_pb2.ListVolumeRevisionsRequest(name=volume.name, page_size=_MOST)
        answers[f"ListVolumeRevisions {volume.name}"] = message_json(await caller.volumes.ListVolumeRevisions(request))
    return answers


async def _operations(caller: Caller) -> dict[str, Any]:
    request = operation_service_pb2.ListOperationsRequest(page_size=_MOST)
    listed = await caller.operations.ListOperations(request)
    answers: dict[str, Any] = {}
    for operation in listed.operations:
        answers[f"GetOperation {operation.id}"] = message_json(operation)
        got = await caller.operations.GetOperation(operation_service_pb2.GetOperationRequest(id=operation.id))
        assert got.operation == operation
        if operation.state == operation_pb2.OPERATION_STATE_SUCCEEDED:
            watch = operation_service_pb2.WatchOperationRequest(id=operation.id)
            *_, last = [answer async for answer in caller.operations.WatchOperation(watch)]
            answers[f"result of {operation.id}"] = message_json(last.result) if last.HasField("result") else None
    return answers


def message_json(message: Message) -> Any:
    """A message as recorded JSON; clears the tokens of the message."""
    for token in _TOKENS:
        if token in message.DESCRIPTOR.fields_by_name:
            message.ClearField(token)
    return MessageToDict(message, preserving_proto_field_name=True, use_integers_for_enums=True)
