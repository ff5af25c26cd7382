"""Validation of requests: every rule of the contract, and all violations together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from gpudock.v1 import (
    container_pb2,
    container_service_pb2,
    exec_pb2,
    node_service_pb2,
    operation_pb2,
    operation_service_pb2,
    registry_auth_pb2,
)
from gpudock_server.core.containers.commands import Create, PullPolicy, Scale, ScaleStrategy, Start, Stop
from gpudock_server.errors import InvalidArgument, OperationNotFound
from gpudock_server.model.engine import ExecRequest, RegistryAuth, TerminalSize
from gpudock_server.model.spec import (
    ContainerSpec,
    GpuRequest,
    Mount,
    PortRequest,
    Protocol,
    RestartPolicy,
    RestartPolicyKind,
    TmpfsMount,
)
from gpudock_server.model.spec import (
    HealthCheck as ContainerHealthCheck,
)
from gpudock_server.rpc import list_requests
from gpudock_server.rpc.containers import requests as container_requests
from gpudock_server.rpc.exec import requests as execs
from gpudock_server.rpc.operations import requests as operation_requests
from gpudock_server.rpc.operations.request_key import request_key

from tests.rpc.request_examples import DAY, SECRET, UUID, create_request, mount, port, violations_of


def test_all_violations_are_reported_together() -> None:
    request = container_service_pb2.CreateContainerRequest(
        name="Train",
        owner="-",
        request_id="no",
        pull_policy=9,  # type: ignore[arg-type]  # no such value: refused
        registry_auth=registry_auth_pb2.RegistryAuth(username="u", identity_token=SECRET),
        spec=container_pb2.ContainerSpec(cpus=-1, ports=[port(0, -1), port(80)], mounts=[mount(target="x")]),
    )
    assert set(violations_of(container_requests.create, request)) == {
        "name",
        "owner",
        "request_id",
        "pull_policy",
        "registry_auth.password",
        "registry_auth.identity_token",
        "spec.image",
        "spec.cpus",
        "spec.ports[0].container_port",
        "spec.ports[0].host_port",
        "spec.mounts[0].target",
    }


def test_a_missing_spec_is_one_violation() -> None:
    request = container_service_pb2.CreateContainerRequest(name="a")
    assert violations_of(container_requests.create, request) == {"spec": "is required"}


def test_a_full_request_becomes_a_command() -> None:
    request = create_request(
        image="registry.example.com:5000/team/app:1.0@sha256:" + "a" * 64,
        entrypoint=[""],
        command=["run", ""],
        env={"A": "1", "NVIDIA_VISIBLE_DEVICES": "all"},
        working_dir="/srv",
        user="1000:users",
        hostname="box.example",
        tty=True,
        stdin=True,
        labels={"team/x": "y"},
        gpus=container_pb2.GpuRequest(count=2, model="a100", min_memory_bytes=1 << 30),
        cpus=1.5,
        memory_bytes=1 << 30,
        shm_size_bytes=1 << 20,
        pids_limit=64,
        mounts=[
            mount(read_only=True),
            container_pb2.Mount(host_path="/srv/../srv", target="/b"),
            container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(size_bytes=1, mode=0), target="/c"),
        ],
        ports=[port(80, 8080, 1), port(80, 8080, 2), port(81)],
        restart_policy=container_pb2.RestartPolicy(
            policy=container_pb2.RESTART_POLICY_KIND_ON_FAILURE, max_retry_count=3
        ),
        stop_signal="SIGINT",
        stop_timeout=Duration(seconds=1, nanos=500_000_001),
        health_check=container_pb2.HealthCheck(command=["true"], interval=Duration(seconds=5), retries=2),
    )
    request.owner = "team@example.com"
    request.pull_policy = container_service_pb2.PULL_POLICY_NEVER
    request.create_only = True
    request.registry_auth.username = "u"
    request.registry_auth.password = SECRET
    assert container_requests.create(request) == Create(
        name="train",
        owner="team@example.com",
        pull_policy=PullPolicy.NEVER,
        create_only=True,
        registry_auth=RegistryAuth(username="u", password=SECRET),
        spec=ContainerSpec(
            image="registry.example.com:5000/team/app:1.0@sha256:" + "a" * 64,
            entrypoint=("",),
            command=("run", ""),
            env={"A": "1", "NVIDIA_VISIBLE_DEVICES": "all"},
            working_dir="/srv",
            user="1000:users",
            hostname="box.example",
            tty=True,
            stdin=True,
            labels={"team/x": "y"},
            gpus=GpuRequest(count=2, model="a100", min_memory_bytes=1 << 30),
            cpus=1.5,
            memory_bytes=1 << 30,
            shm_size_bytes=1 << 20,
            pids_limit=64,
            mounts=(
                Mount(volume="data", target="/data", read_only=True),
                Mount(host_path="/srv/../srv", target="/b"),
                Mount(tmpfs=TmpfsMount(size_bytes=1, mode=0), target="/c"),
            ),
            ports=(
                PortRequest(container_port=80, host_port=8080),
                PortRequest(container_port=80, host_port=8080, protocol=Protocol.UDP),
                PortRequest(container_port=81),
            ),
            restart_policy=RestartPolicy(kind=RestartPolicyKind.ON_FAILURE, max_retry_count=3),
            stop_signal="SIGINT",
            # Rounded up, never down: no process is killed before the requested time.
            stop_timeout=timedelta(seconds=1, microseconds=500_001),
            health_check=ContainerHealthCheck(command=("true",), interval=timedelta(seconds=5), retries=2),
        ),
    )


def test_omitted_fields_have_defaults() -> None:
    command = container_requests.create(create_request())
    assert command == Create(name="train", spec=ContainerSpec(image="busybox"))


ON_EXISTING: tuple[tuple[Callable[[Any], object], type[Message]], ...] = (
    (container_requests.start, container_service_pb2.StartContainerRequest),
    (container_requests.stop, container_service_pb2.StopContainerRequest),
    (container_requests.restart, container_service_pb2.RestartContainerRequest),
    (container_requests.pause, container_service_pb2.PauseContainerRequest),
    (container_requests.unpause, container_service_pb2.UnpauseContainerRequest),
    (container_requests.delete, container_service_pb2.DeleteContainerRequest),
)


@pytest.mark.parametrize(("validate", "request_type"), ON_EXISTING, ids=[v.__name__ for v, _ in ON_EXISTING])
def test_a_change_needs_a_name_and_a_uuid(validate: Callable[[Any], object], request_type: type[Message]) -> None:
    request = request_type(request_id="x")
    assert set(violations_of(validate, request)) == {"name", "request_id"}
    named = request_type(name="a", request_id=UUID.upper(), etag="e")
    assert validate(named)


def test_get_needs_a_name() -> None:
    assert set(violations_of(container_requests.get, container_service_pb2.GetContainerRequest(name="a\n"))) == {"name"}
    assert container_requests.get(container_service_pb2.GetContainerRequest(name="a")) == "a"


def test_timeouts_are_rounded_up_to_whole_seconds() -> None:
    request = container_service_pb2.StopContainerRequest(name="a", timeout=Duration(seconds=1, nanos=1))
    assert container_requests.stop(request) == Stop(name="a", timeout=2.0)
    at_once = container_service_pb2.StopContainerRequest(name="a", timeout=Duration())
    assert container_requests.stop(at_once).timeout == 0.0
    for validate, request_type in ON_EXISTING[1:3]:
        late = request_type(name="a", timeout=Duration(seconds=DAY + 1))
        assert violations_of(validate, late) == {"timeout": "must be 0 s to 86400 s"}


def test_start_with_gpus() -> None:
    request = container_service_pb2.StartContainerRequest(name="a", gpus=container_pb2.GpuRequest())
    assert container_requests.start(request) == Start(name="a", gpus=GpuRequest())
    assert container_requests.start(container_service_pb2.StartContainerRequest(name="a")) == Start(name="a", gpus=None)
    request.gpus.count = 17
    assert set(violations_of(container_requests.start, request)) == {"gpus.count"}


def test_a_scale_is_converted() -> None:
    request = container_service_pb2.ScaleContainerRequest
    assert set(violations_of(container_requests.scale, request(name="a"))) == {"gpus"}
    bad = request(name="a", cpus=0.001, memory_bytes=1, shm_size_bytes=-1, strategy=9, request_id="1")  # type: ignore[arg-type]  # no such value: refused
    assert set(violations_of(container_requests.scale, bad)) == {
        "cpus",
        "memory_bytes",
        "shm_size_bytes",
        "strategy",
        "request_id",
    }
    none = container_requests.scale(
        request(name="a", cpus=-0.0, memory_bytes=0, strategy=container_service_pb2.SCALE_STRATEGY_LIVE)
    )
    assert none == Scale(name="a", cpus=0.0, memory_bytes=0, strategy=ScaleStrategy.LIVE)
    assert str(none.cpus) == "0.0"


def test_filters_of_lists_are_converted() -> None:
    request = container_service_pb2.ListContainersRequest
    filtered = container_service_pb2.ContainerFilter(states=[9, 0])  # type: ignore[list-item]  # no such value: refused
    bad = request(page_size=-1, page_token=SECRET, filter=filtered)
    assert set(violations_of(list_requests.containers, bad)) == {"page_size", "page_token", "filter.states"}
    assert list_requests.containers(request()).size == 100
    assert list_requests.containers(request(page_size=7)).size == 7
    assert list_requests.containers(request(page_size=1001)).size == 1000
    kinds = operation_service_pb2.OperationFilter(
        states=[99],  # type: ignore[list-item]  # no such value: refused
        kinds=[99],  # type: ignore[list-item]  # no such value: refused
        target=operation_pb2.ResourceRef(kind=9),  # type: ignore[arg-type]  # no such value: refused
    )
    found = violations_of(list_requests.operations, operation_service_pb2.ListOperationsRequest(filter=kinds))
    assert set(found) == {"filter.states", "filter.kinds", "filter.target.kind"}
    healths = node_service_pb2.GpuFilter(healths=[9])  # type: ignore[list-item]  # no such value: refused
    assert set(violations_of(list_requests.gpus, node_service_pb2.ListGpusRequest(filter=healths))) == {
        "filter.healths"
    }
    protocols = node_service_pb2.PortFilter(protocols=[9])  # type: ignore[list-item]  # no such value: refused
    assert set(violations_of(list_requests.ports, node_service_pb2.ListPortsRequest(filter=protocols))) == {
        "filter.protocols"
    }


def test_a_page_token_belongs_to_its_list_and_filter() -> None:
    first = container_service_pb2.ListContainersRequest(filter=container_service_pb2.ContainerFilter(owner="a"))
    token = list_requests.containers(first).token("there")
    first.page_token, first.page_size = token, 5
    assert list_requests.containers(first).resume == "there"
    first.filter.owner = "b"
    assert set(violations_of(list_requests.containers, first)) == {"page_token"}
    other = operation_service_pb2.ListOperationsRequest(page_token=token)
    assert set(violations_of(list_requests.operations, other)) == {"page_token"}
    for broken in (token[:-1], token + "A", "é", "\0"):
        cut = container_service_pb2.ListContainersRequest(
            filter=container_service_pb2.ContainerFilter(owner="a"), page_token=broken
        )
        assert set(violations_of(list_requests.containers, cut)) == {"page_token"}


def test_operation_ids_are_validated() -> None:
    request = operation_service_pb2.CancelOperationRequest
    assert set(violations_of(operation_requests.operation_id, request(request_id="1"))) == {"id", "request_id"}
    assert operation_requests.operation_id(request(id=UUID.upper())) == UUID
    with pytest.raises(OperationNotFound):
        operation_requests.operation_id(request(id="../locks"))


def exec_start(**fields: Any) -> exec_pb2.ExecContainerRequest:
    """Return a first message that is valid except for `fields`."""
    return exec_pb2.ExecContainerRequest(start=exec_pb2.ExecStart(**{"container": "a", "command": ["true"], **fields}))


def test_the_first_message_of_an_exec_is_validated() -> None:
    for first in (None, exec_pb2.ExecContainerRequest(), exec_pb2.ExecContainerRequest(stdin=b"")):
        with pytest.raises(InvalidArgument) as caught:
            execs.start(first)
        assert [violation.field for violation in caught.value.violations] == ["start"]
    bad = exec_start(
        container="",
        command=[],
        exec_id="1",
        env={"=": ""},
        working_dir="x",
        user=":",
        size=exec_pb2.TerminalSize(columns=0, rows=65536),
        timeout=Duration(),
    )
    assert set(violations_of(execs.start, bad)) == {
        "start.container",
        "start.command",
        "start.exec_id",
        'start.env["="]',
        "start.working_dir",
        "start.user",
        "start.size",
        "start.size.columns",
        "start.size.rows",
        "start.timeout",
    }
    assert set(violations_of(execs.start, exec_start(timeout=Duration(seconds=30 * DAY, nanos=1)))) == {"start.timeout"}


def test_a_start_of_an_exec_is_converted() -> None:
    assert execs.start(exec_start(exec_id=UUID.upper(), timeout=Duration(nanos=1_000_000))) == execs.ExecStartRequest(
        container="a", exec_id=UUID, request=ExecRequest(command=("true",)), timeout=0.001
    )
    assert execs.start(exec_start(tty=True)).request.size == TerminalSize(columns=80, rows=24)
    sized = exec_start(tty=True, size=exec_pb2.TerminalSize(columns=100, rows=50))
    assert execs.start(sized).request.size == TerminalSize(columns=100, rows=50)


def test_later_messages_of_an_exec_are_validated() -> None:
    message = exec_pb2.ExecContainerRequest
    stdin = message(stdin=b"x")
    assert execs.stdin(stdin, enabled=True, closed=False) == b"x"
    assert set(violations_of(lambda m: execs.stdin(m, enabled=False, closed=False), stdin)) == {"stdin"}
    assert set(violations_of(lambda m: execs.stdin(m, enabled=True, closed=True), stdin)) == {"stdin"}
    large = message(stdin=b"x" * (1024 * 1024 + 1))
    assert set(violations_of(lambda m: execs.stdin(m, enabled=True, closed=False), large)) == {"stdin"}
    assert set(violations_of(lambda _: execs.close_stdin(enabled=False), stdin)) == {"close_stdin"}
    resize = message(resize=exec_pb2.TerminalSize(columns=1, rows=0))
    assert set(violations_of(lambda m: execs.resize(m, tty=False), resize)) == {"resize", "resize.rows"}
    assert execs.signal(message(signal=exec_pb2.ExecSignal(signal="term"))) == "term"
    assert set(violations_of(execs.signal, message(signal=exec_pb2.ExecSignal(signal="x")))) == {"signal.signal"}
    assert set(violations_of(execs.unexpected, exec_start())) == {"start"}
    assert set(violations_of(execs.unexpected, message())) == {"message"}


def test_request_keys_depend_on_the_method() -> None:
    request = container_service_pb2.PauseContainerRequest(name="a", request_id=UUID)
    found = request_key(request)
    other = request_key(container_service_pb2.UnpauseContainerRequest(name="a", request_id=UUID))
    assert found is not None
    assert other is not None
    assert found.digest != other.digest
    # Digests are recorded, so later versions must compute the same.
    request.ClearField("request_id")
    content = b"/gpudock.v1.ContainerService/PauseContainer\0" + request.SerializeToString(deterministic=True)
    assert found.digest == hashlib.sha256(content).hexdigest()


def test_request_keys_do_not_depend_on_the_id_and_credentials() -> None:
    def key(**fields: Any) -> tuple[str, str] | None:
        request = create_request(env={"A": "1", "B": "2", "C": "3"})
        request.MergeFrom(container_service_pb2.CreateContainerRequest(**{"request_id": UUID, **fields}))
        found = request_key(request)
        return (found.id, found.digest) if found else None

    assert key() == key(request_id=UUID.upper(), registry_auth=registry_auth_pb2.RegistryAuth(password=SECRET))
    assert key() != key(create_only=True)
    assert key(validate_only=True) is None
    assert request_key(create_request()) is None
