"""Every limit of a request: the last value that is accepted, and the first that is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from gpudock.v1 import container_pb2, container_service_pb2, exec_pb2
from gpudock_server.model import image_reference
from gpudock_server.rpc.containers import commit_request
from gpudock_server.rpc.containers import requests as container_requests
from gpudock_server.rpc.exec import requests as execs
from gpudock_server.rpc.validation.violations import Violations

from tests.rpc.request_examples import DAY, create_request, mount, port, violations_of

KIB, MIB = 1024, 1 << 20
# The longest duration that the engine accepts, in whole seconds.
MOST_CHECK = 9_223_372_036


def tmpfs(**fields: Any) -> dict[str, Any]:
    return {"mounts": [container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(**fields), target="/t")]}


def mounts(number: int) -> dict[str, Any]:
    return {"mounts": [mount(target=f"/{index}") for index in range(number)]}


def target(path: str) -> dict[str, Any]:
    return {"mounts": [mount(target=path)]}


def ports(number: int) -> dict[str, Any]:
    return {"ports": [port(index + 1) for index in range(number)]}


def gpus(**fields: Any) -> dict[str, Any]:
    return {"gpus": container_pb2.GpuRequest(**fields)}


def check(**fields: Any) -> dict[str, Any]:
    return {"health_check": container_pb2.HealthCheck(**fields)}


def policy(**fields: Any) -> dict[str, Any]:
    return {"revision_policy": container_pb2.RevisionPolicy(**fields)}


# A field, its last accepted value, and its first refused value.
LIMITS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("spec.image", {"image": "a" * 512}, {"image": "a" * 513}),
    ("spec.command", {"command": ["a"] * 1024}, {"command": ["a"] * 1025}),
    ("spec.command", {"command": ["a" * 128 * KIB]}, {"command": ["a" * 256 * KIB, "b"]}),
    ("spec.env", {"env": {f"A{n}": "" for n in range(1024)}}, {"env": {f"A{n}": "" for n in range(1025)}}),
    ('spec.env["' + "A" * 60 + '…"]', {"env": {"A" * 255: ""}}, {"env": {"A" * 256: ""}}),
    ("spec.working_dir", {"working_dir": "/" + "a" * 4094}, {"working_dir": "/" + "a" * 4095}),
    ("spec.user", {"user": "2147483647:2147483647"}, {"user": "0:2147483648"}),
    ("spec.user", {"user": "a" * 255}, {"user": "a" * 256}),
    ("spec.hostname", {"hostname": "a" * 63}, {"hostname": "a" * 64}),
    ("spec.labels", {"labels": {f"a{n}": "" for n in range(64)}}, {"labels": {f"a{n}": "" for n in range(65)}}),
    ('spec.labels["a"]', {"labels": {"a": "é" * 512}}, {"labels": {"a": "é" * 512 + "e"}}),
    ("spec.gpus.count", gpus(count=16), gpus(count=17)),
    ("spec.gpus.model", gpus(count=1, model="é" * 48), gpus(count=1, model="é" * 48 + "e")),
    ("spec.gpus.uuids", gpus(uuids=[f"G{n}" for n in range(16)]), gpus(uuids=[f"G{n}" for n in range(17)])),
    ("spec.gpus.uuids[1]", gpus(uuids=["b", "a" * 96]), gpus(uuids=["b", "a" * 97])),
    ("spec.gpus.count", gpus(uuids=["a", "b"], count=2), gpus(uuids=["a", "b"], count=1)),
    ("spec.gpus.min_memory_bytes", gpus(count=1, min_memory_bytes=1), gpus(count=1, min_memory_bytes=-1)),
    ("spec.cpus", {"cpus": 0.01}, {"cpus": 0.009}),
    ("spec.cpus", {"cpus": 8192}, {"cpus": 8192.01}),
    ("spec.memory_bytes", {"memory_bytes": 6 * MIB}, {"memory_bytes": 6 * MIB - 1}),
    ("spec.shm_size_bytes", {"shm_size_bytes": 4096}, {"shm_size_bytes": 4095}),
    (
        "spec.shm_size_bytes",
        {"shm_size_bytes": 6 * MIB, "memory_bytes": 6 * MIB},
        {"shm_size_bytes": 6 * MIB + 1, "memory_bytes": 6 * MIB},
    ),
    ("spec.pids_limit", {"pids_limit": 16}, {"pids_limit": 15}),
    ("spec.pids_limit", {"pids_limit": 4_194_304}, {"pids_limit": 4_194_305}),
    ("spec.mounts", mounts(64), mounts(65)),
    ("spec.mounts[0].tmpfs.mode", tmpfs(mode=0o7777), tmpfs(mode=0o10000)),
    ("spec.mounts[0].tmpfs.size_bytes", tmpfs(size_bytes=1), tmpfs(size_bytes=-1)),
    ("spec.mounts[0].target", target("/" + "a" * 4094), target("/" + "a" * 4095)),
    ("spec.ports", ports(32), ports(33)),
    ("spec.ports[0].container_port", {"ports": [port(65535)]}, {"ports": [port(65536)]}),
    ("spec.ports[0].container_port", {"ports": [port(1)]}, {"ports": [port(0)]}),
    ("spec.ports[0].host_port", {"ports": [port(80, 65535)]}, {"ports": [port(80, 65536)]}),
    ("spec.stop_timeout", {"stop_timeout": Duration(seconds=DAY)}, {"stop_timeout": Duration(seconds=DAY, nanos=1)}),
    ("spec.stop_timeout", {"stop_timeout": Duration()}, {"stop_timeout": Duration(nanos=-1)}),
    ("spec.health_check.interval", check(interval=Duration(nanos=1_000_000)), check(interval=Duration(nanos=999_999))),
    (
        "spec.health_check.timeout",
        check(timeout=Duration(seconds=MOST_CHECK)),
        check(timeout=Duration(seconds=MOST_CHECK, nanos=1)),
    ),
    ("spec.revision_policy.keep_revisions", policy(keep_revisions=10_000), policy(keep_revisions=10_001)),
    ("spec.revision_policy.keep_for", policy(keep_for=Duration(seconds=1)), policy(keep_for=Duration(nanos=1))),
]  # fmt: skip


@pytest.mark.parametrize(("field", "most", "more"), LIMITS, ids=[f"{n} {limit[0]}" for n, limit in enumerate(LIMITS)])
def test_the_limit_of_a_field_of_a_spec(field: str, most: dict[str, Any], more: dict[str, Any]) -> None:
    container_requests.create(create_request(**most))
    assert set(violations_of(container_requests.create, create_request(**more))) == {field}


def test_names_and_values_of_variables_share_one_limit() -> None:
    most = exec_pb2.ExecStart(container="a", command=["b"], env={"AB": "x" * (256 * KIB - 2)})
    execs.start(exec_pb2.ExecContainerRequest(start=most))
    most.env["AB"] += "x"
    assert set(violations_of(execs.start, exec_pb2.ExecContainerRequest(start=most))) == {"start.env"}


def test_arguments_share_one_limit() -> None:
    most = exec_pb2.ExecStart(container="a", command=["b", "x" * (256 * KIB - 1)])
    execs.start(exec_pb2.ExecContainerRequest(start=most))
    most.command[1] += "x"
    assert set(violations_of(execs.start, exec_pb2.ExecContainerRequest(start=most))) == {"start.command"}


def test_invalid_durations_are_refused() -> None:
    for span in (
        Duration(seconds=315_576_000_001),
        Duration(seconds=1, nanos=-1),
        Duration(nanos=1_000_000_000),
    ):
        found = violations_of(container_requests.create, create_request(stop_timeout=span))
        assert found == {
            "spec.stop_timeout": "is not a valid Duration: seconds and nanos must be in range and have the same sign"
        }
    words = violations_of(
        container_requests.create, create_request(health_check=container_pb2.HealthCheck(interval=Duration()))
    )
    assert words == {"spec.health_check.interval": "must be 1 ms to 9223372036 s"}


COMMIT_LIMITS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("repository", {"repository": "a" * 255}, {"repository": "a" * 256}),
    ("tag", {"tag": "a" * 128}, {"tag": "a" * 129}),
    ("author", {"author": "é" * 128}, {"author": "é" * 128 + "e"}),
    ("comment", {"comment": "é" * 512}, {"comment": "é" * 512 + "e"}),
    ("changes", {"changes": ["USER a"] * 64}, {"changes": ["USER a"] * 65}),
    ("changes[0]", {"changes": ["USER " + "a" * 4091]}, {"changes": ["USER " + "a" * 4092]}),
    ("changes[0]", {"changes": ["EXPOSE 1-65535"]}, {"changes": ["EXPOSE 1-65536"]}),
    ("changes[0]", {"changes": ["EXPOSE 1 65535/udp"]}, {"changes": ["EXPOSE 0"]}),
    ("changes[0]", {"changes": ["EXPOSE 80-80"]}, {"changes": ["EXPOSE 81-80"]}),
]


@pytest.mark.parametrize(("field", "most", "more"), COMMIT_LIMITS)
def test_the_limit_of_a_field_of_a_commit(field: str, most: dict[str, Any], more: dict[str, Any]) -> None:
    def request(fields: dict[str, Any]) -> container_service_pb2.CommitContainerRequest:
        return container_service_pb2.CommitContainerRequest(**{"name": "a", "repository": "team/model", **fields})

    commit_request.commit(request(most))
    assert set(violations_of(commit_request.commit, request(more))) == {field}


def test_invalid_lines_of_a_commit_are_described() -> None:
    lines = ["user ", " \\ USER a", "USER a \\ ", "EXPOSE x", "ENV A", "CMD [1]", "VOLUME a", "WORKDIR a", "USER a b"]
    request = container_service_pb2.CommitContainerRequest(name="a", repository="b", changes=lines)
    found = violations_of(commit_request.commit, request)
    assert found["changes[0]"] == "USER needs an argument"
    assert found["changes[2]"] == "must be one line of printable characters, without a backslash at its end"
    assert found["changes[3]"] == "invalid port 'x'; use 80, 53/udp or 8000-8010"
    assert set(found) == {f"changes[{index}]" for index in range(len(lines))}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (lambda here: here.add("a", "x"), "a"),
        (lambda here: here.add("", "x"), ""),
        (lambda here: here.at("a").add("b", "x", 0), "a.b[0]"),
        (lambda here: here.at("a", 3).add("", "x"), "a[3]"),
        (lambda here: here.at("a", "k").at("b").add("c", "x", "v"), 'a["k"].b.c["v"]'),
        (lambda here: here.add("a", "x", "k" * 60), f'a["{"k" * 60}"]'),
        (lambda here: here.add("a", "x", "k" * 61), f'a["{"k" * 60}…"]'),
    ],
)
def test_the_path_of_a_violation(wrong: Callable[[Violations], None], field: str) -> None:
    violations = Violations()
    assert not Violations().any
    wrong(violations)
    assert violations.any
    assert [(str(violation.field), violation.description) for violation in violations.found] == [(field, "x")]


@pytest.mark.parametrize(
    ("reference", "valid"),
    [
        ("localhost/a:b", True),
        ("localhost/A", False),
        ("Localhost.x/a", True),
        ("reg:80/a", True),
        ("Reg/a", False),
        ("a@sha256:" + "0" * 64, True),
        ("a@sha256:" + "0" * 31, False),
        ("sha256:" + "0" * 64, True),
        ("a:" + "t" * 128, True),
        ("a:" + "t" * 129, False),
        ("", False),
        ("a:", False),
        ("/a", False),
        ("a//b", False),
    ],
)
def test_which_image_references_are_valid(reference: str, *, valid: bool) -> None:
    assert image_reference.is_image_reference(reference) is valid
