"""Any request is accepted, or refused with an error of the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from google.protobuf.message import Message
from gpudock.v1 import (
    exec_pb2,
)
from gpudock_server.core.containers.commands import Create
from gpudock_server.errors import GpudockError, InvalidArgument
from gpudock_server.rpc import list_requests, watch_requests
from gpudock_server.rpc.containers import commit_request
from gpudock_server.rpc.containers import requests as container_requests
from gpudock_server.rpc.containers.spec_messages import spec_message
from gpudock_server.rpc.containers.spec_requests import spec
from gpudock_server.rpc.exec import requests as execs
from gpudock_server.rpc.operations import requests as operation_requests
from gpudock_server.rpc.operations.request_key import request_key
from gpudock_server.rpc.validation.violations import Violations
from gpudock_server.rpc.volumes import requests as volume_requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rpc.fuzz_requests import CALLS, EXAMPLES, corrupted, requests

VALIDATORS: Mapping[str, Callable[[Any], object]] = {
    "CreateContainer": container_requests.create,
    "GetContainer": container_requests.get,
    "ListContainers": list_requests.containers,
    "WatchContainers": watch_requests.containers,
    "StartContainer": container_requests.start,
    "StopContainer": container_requests.stop,
    "RestartContainer": container_requests.restart,
    "PauseContainer": container_requests.pause,
    "UnpauseContainer": container_requests.unpause,
    "DeleteContainer": container_requests.delete,
    "ScaleContainer": container_requests.scale,
    "UpdateContainer": container_requests.update,
    "RollbackContainer": container_requests.rollback,
    "CloneContainer": container_requests.clone,
    "GetContainerRevision": container_requests.get_revision,
    "ListContainerRevisions": list_requests.revisions,
    "DeleteContainerRevision": container_requests.delete_revision,
    "CommitContainer": commit_request.commit,
    "ExecContainer": execs.start,
    "CreateVolume": volume_requests.create,
    "GetVolume": volume_requests.get,
    "ListVolumes": list_requests.volumes,
    "WatchVolumes": watch_requests.volumes,
    "ResizeVolume": volume_requests.resize,
    "DeleteVolume": volume_requests.delete,
    "ListVolumeRevisions": list_requests.volume_revisions,
    "AdoptVolume": volume_requests.adopt,
    "ListGpus": list_requests.gpus,
    "ListPorts": list_requests.ports,
    "ListDrift": list_requests.drift,
    "GetOperation": operation_requests.operation_id,
    "ListOperations": list_requests.operations,
    "WatchOperation": operation_requests.operation_id,
    "CancelOperation": operation_requests.operation_id,
}
# It takes only the name of a node, and any name can be of a missing node.
UNCHECKED = {"GetNode"}


def test_every_rpc_has_a_validation() -> None:
    assert {call.path.rpartition("/")[2] for call in CALLS} == VALIDATORS.keys() | UNCHECKED


@pytest.mark.parametrize("method", VALIDATORS)
def test_any_message_is_accepted_or_refused_with_an_error_of_the_contract(method: str) -> None:
    validate = VALIDATORS[method]
    request_type = next(call.request for call in CALLS if call.path.endswith(f"/{method}"))

    @settings(
        max_examples=max(20, EXAMPLES // len(VALIDATORS)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(requests(request_type), corrupted(request_type)))
    def check(request: Message) -> None:
        try:
            found = validate(request)
        except GpudockError as error:
            # The message of the error can be created from any request.
            str(error)
            return
        if isinstance(found, Create):
            # An accepted spec is shown as it was accepted.
            violations = Violations()
            assert spec(violations, spec_message(found.spec)) == found.spec
            assert not violations.any
        if hasattr(request, "validate_only"):
            request_key(request)  # type: ignore[arg-type]  # these have a request_id

    check()


@pytest.mark.parametrize("kind", ["stdin", "close_stdin", "resize", "signal", "other"])
def test_any_later_exec_message_is_accepted_or_refused(kind: str) -> None:
    @settings(
        max_examples=max(20, EXAMPLES // 50), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(requests(exec_pb2.ExecContainerRequest))
    def check(message: exec_pb2.ExecContainerRequest) -> None:
        try:
            match kind:
                case "stdin":
                    execs.stdin(message, enabled=True, closed=False)
                case "resize":
                    execs.resize(message, tty=True)
                case "signal":
                    execs.signal(message)
                case _:
                    execs.unexpected(message)
        except InvalidArgument:
            pass

    check()
