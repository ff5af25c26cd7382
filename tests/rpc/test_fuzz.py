"""Whatever a request holds, it is taken or refused with an error that a caller may see."""

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
from gpudock_server.rpc.convert.spec import spec_message
from gpudock_server.rpc.request_key import request_key
from gpudock_server.rpc.validation import commit, containers, listing, operations, volumes, watching
from gpudock_server.rpc.validation import exec as execs
from gpudock_server.rpc.validation.spec import spec
from gpudock_server.rpc.validation.violations import Violations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rpc.fuzz_requests import CALLS, EXAMPLES, damaged, requests

VALIDATORS: Mapping[str, Callable[[Any], object]] = {
    "CreateContainer": containers.create,
    "GetContainer": containers.get,
    "ListContainers": listing.containers,
    "WatchContainers": watching.containers,
    "StartContainer": containers.start,
    "StopContainer": containers.stop,
    "RestartContainer": containers.restart,
    "PauseContainer": containers.pause,
    "UnpauseContainer": containers.unpause,
    "DeleteContainer": containers.delete,
    "ScaleContainer": containers.scale,
    "UpdateContainer": containers.update,
    "RollbackContainer": containers.rollback,
    "CloneContainer": containers.clone,
    "GetContainerRevision": containers.get_revision,
    "ListContainerRevisions": listing.revisions,
    "DeleteContainerRevision": containers.delete_revision,
    "CommitContainer": commit.commit,
    "ExecContainer": execs.start,
    "CreateVolume": volumes.create,
    "GetVolume": volumes.get,
    "ListVolumes": listing.volumes,
    "WatchVolumes": watching.volumes,
    "ResizeVolume": volumes.resize,
    "DeleteVolume": volumes.delete,
    "ListVolumeRevisions": listing.volume_revisions,
    "AdoptVolume": volumes.adopt,
    "ListGpus": listing.gpus,
    "ListPorts": listing.ports,
    "ListDrift": listing.drift,
    "GetOperation": operations.operation_id,
    "ListOperations": listing.operations,
    "WatchOperation": operations.operation_id,
    "CancelOperation": operations.operation_id,
}
# Takes the name of a node alone, and any name is one that may not be there.
UNCHECKED = {"GetNode"}


def test_every_rpc_has_a_validation() -> None:
    assert {call.path.rpartition("/")[2] for call in CALLS} == VALIDATORS.keys() | UNCHECKED


@pytest.mark.parametrize("method", VALIDATORS)
def test_any_message_is_valid_or_an_error_that_a_caller_may_see(method: str) -> None:
    validate = VALIDATORS[method]
    request_type = next(call.request for call in CALLS if call.path.endswith(f"/{method}"))

    @settings(
        max_examples=max(20, EXAMPLES // len(VALIDATORS)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(requests(request_type), damaged(request_type)))
    def check(request: Message) -> None:
        try:
            found = validate(request)
        except GpudockError as error:
            # What a caller is told can be put into words, whatever was in the request.
            str(error)
            return
        if isinstance(found, Create):
            # What was taken is shown as it was taken.
            violations = Violations()
            assert spec(violations, spec_message(found.spec)) == found.spec
            assert not violations.any
        if hasattr(request, "validate_only"):
            request_key(method, request)  # type: ignore[arg-type]  # these have a request_id

    check()


@pytest.mark.parametrize("kind", ["stdin", "close_stdin", "resize", "signal", "other"])
def test_any_later_exec_message(kind: str) -> None:
    @settings(
        max_examples=max(20, EXAMPLES // 50), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(requests(exec_pb2.ExecContainerRequest))
    def check(message: exec_pb2.ExecContainerRequest) -> None:
        try:
            match kind:
                case "stdin":
                    execs.stdin(message, wanted=True, closed=False)
                case "resize":
                    execs.resize(message, tty=True)
                case "signal":
                    execs.signal(message)
                case _:
                    execs.unexpected(message)
        except InvalidArgument:
            pass

    check()
