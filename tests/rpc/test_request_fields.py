"""Each request with all fields valid becomes a command with them; with all fields invalid, each is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from gpudock.v1 import container_pb2, container_service_pb2, registry_auth_pb2, volume_pb2, volume_service_pb2
from gpudock_server.core.containers.commands import (
    Clone,
    Create,
    Delete,
    DeleteRevision,
    FilesPolicy,
    Pause,
    PullPolicy,
    Restart,
    Rollback,
    Scale,
    ScaleStrategy,
    Start,
    Stop,
    Unpause,
    Update,
)
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.model.engine import HostCapacity, RegistryAuth
from gpudock_server.model.spec import ContainerSpec, GpuRequest, RevisionPolicy, SnapshotPolicy
from gpudock_server.model.volume import VolumeBackendKind
from gpudock_server.rpc.containers import requests as container_requests
from gpudock_server.rpc.volumes import requests as volume_requests

from tests.rpc.request_examples import DAY, SECRET, UUID, create_request, violations_of

NEVER = container_pb2.SNAPSHOT_POLICY_NEVER
ON: dict[str, Any] = {"name": "a", "request_id": UUID, "etag": "e"}
BAD_ON: dict[str, Any] = {"name": "A", "request_id": "x"}
AUTH = registry_auth_pb2.RegistryAuth(identity_token=SECRET, server_address="reg.example")
BAD_AUTH = registry_auth_pb2.RegistryAuth(username="u", identity_token=SECRET)
BAD_AUTHS = {"registry_auth.password", "registry_auth.identity_token"}
LONG_DAY = Duration(seconds=DAY, nanos=1)
MANY = 10**10


@dataclass(frozen=True)
class Case:
    """A valid request with its result, and an invalid request with its invalid fields."""

    validate: Callable[[Any], object]
    good: Message
    command: object
    bad: Message
    wrong: set[str]


CASES = [
    Case(
        container_requests.create,
        container_service_pb2.CreateContainerRequest(
            name="a",
            owner="o",
            spec=container_pb2.ContainerSpec(
                image="busybox",
                revision_policy=container_pb2.RevisionPolicy(
                    snapshots=NEVER, keep_revisions=10_000, keep_for=Duration(seconds=1)
                ),
            ),
            pull_policy=container_service_pb2.PULL_POLICY_ALWAYS,
            create_only=True,
            request_id=UUID,
            registry_auth=AUTH,
            pull_stall_timeout=Duration(nanos=1_000_000),
        ),
        Create(
            name="a",
            owner="o",
            spec=ContainerSpec(
                image="busybox",
                revision_policy=RevisionPolicy(
                    snapshots=SnapshotPolicy.NEVER, keep_revisions=10_000, keep_for=timedelta(seconds=1)
                ),
            ),
            pull_policy=PullPolicy.ALWAYS,
            create_only=True,
            registry_auth=RegistryAuth(identity_token=SECRET, server_address="reg.example"),
            pull_stall_seconds=0.001,
        ),
        container_service_pb2.CreateContainerRequest(
            name="A",
            owner="-",
            spec=container_pb2.ContainerSpec(
                image="B",
                entrypoint=["\0"],
                command=["\0"],
                env={"=": ""},
                working_dir="x",
                user=":",
                hostname="_",
                labels={"-": ""},
                gpus=container_pb2.GpuRequest(count=-1, min_memory_bytes=-1, model="\0"),
                cpus=-1,
                memory_bytes=-1,
                shm_size_bytes=-1,
                pids_limit=-1,
                mounts=[container_pb2.Mount(target="x")],
                ports=[container_pb2.PortRequest(container_port=0, host_port=-1, protocol=9)],  # type: ignore[arg-type]  # no such value: refused
                restart_policy=container_pb2.RestartPolicy(policy=9, max_retry_count=-1),  # type: ignore[arg-type]  # no such value: refused
                stop_signal="x",
                stop_timeout=LONG_DAY,
                health_check=container_pb2.HealthCheck(
                    command=[""],
                    interval=Duration(),
                    timeout=Duration(),
                    start_period=Duration(),
                    retries=-1,
                ),
                revision_policy=container_pb2.RevisionPolicy(
                    snapshots=9,  # type: ignore[arg-type]  # no such value: refused
                    keep_revisions=10_001,
                    keep_for=Duration(),
                ),
            ),
            pull_policy=9,  # type: ignore[arg-type]  # no such value: refused
            request_id="x",
            registry_auth=BAD_AUTH,
            pull_stall_timeout=LONG_DAY,
        ),
        {
            "name",
            "owner",
            "pull_policy",
            "request_id",
            "pull_stall_timeout",
            *BAD_AUTHS,
            "spec.image",
            "spec.entrypoint[0]",
            "spec.command[0]",
            'spec.env["="]',
            "spec.working_dir",
            "spec.user",
            "spec.hostname",
            'spec.labels["-"]',
            "spec.gpus.count",
            "spec.gpus.min_memory_bytes",
            "spec.gpus.model",
            "spec.cpus",
            "spec.memory_bytes",
            "spec.shm_size_bytes",
            "spec.pids_limit",
            "spec.mounts[0].source",
            "spec.mounts[0].target",
            "spec.ports[0].container_port",
            "spec.ports[0].host_port",
            "spec.ports[0].protocol",
            "spec.restart_policy.policy",
            "spec.restart_policy.max_retry_count",
            "spec.stop_signal",
            "spec.stop_timeout",
            "spec.health_check.command[0]",
            "spec.health_check.interval",
            "spec.health_check.timeout",
            "spec.health_check.start_period",
            "spec.health_check.retries",
            "spec.revision_policy.snapshots",
            "spec.revision_policy.keep_revisions",
            "spec.revision_policy.keep_for",
        },
    ),
    Case(
        container_requests.start,
        container_service_pb2.StartContainerRequest(gpus=container_pb2.GpuRequest(count=1), snapshots=NEVER, **ON),
        Start(name="a", gpus=GpuRequest(count=1), snapshots=SnapshotPolicy.NEVER, etag="e"),
        container_service_pb2.StartContainerRequest(
            gpus=container_pb2.GpuRequest(count=-1),
            snapshots=9,  # type: ignore[arg-type]  # no such value: refused
            **BAD_ON,
        ),
        {"gpus.count", "snapshots"},
    ),
    Case(
        container_requests.stop,
        container_service_pb2.StopContainerRequest(keep_resources=True, timeout=Duration(seconds=DAY), **ON),
        Stop(name="a", keep_resources=True, timeout=float(DAY), etag="e"),
        container_service_pb2.StopContainerRequest(timeout=LONG_DAY, **BAD_ON),
        {"timeout"},
    ),
    Case(
        container_requests.restart,
        container_service_pb2.RestartContainerRequest(timeout=Duration(seconds=3), snapshots=NEVER, **ON),
        Restart(name="a", timeout=3.0, snapshots=SnapshotPolicy.NEVER, etag="e"),
        container_service_pb2.RestartContainerRequest(
            timeout=Duration(seconds=-1),
            snapshots=9,  # type: ignore[arg-type]  # no such value: refused
            **BAD_ON,
        ),
        {"timeout", "snapshots"},
    ),
    Case(
        container_requests.pause,
        container_service_pb2.PauseContainerRequest(**ON),
        Pause(name="a", etag="e"),
        container_service_pb2.PauseContainerRequest(**BAD_ON),
        set(),
    ),
    Case(
        container_requests.unpause,
        container_service_pb2.UnpauseContainerRequest(**ON),
        Unpause(name="a", etag="e"),
        container_service_pb2.UnpauseContainerRequest(**BAD_ON),
        set(),
    ),
    Case(
        container_requests.delete,
        container_service_pb2.DeleteContainerRequest(force=True, **ON),
        Delete(name="a", force=True, etag="e"),
        container_service_pb2.DeleteContainerRequest(**BAD_ON),
        set(),
    ),
    Case(
        container_requests.scale,
        container_service_pb2.ScaleContainerRequest(
            gpus=container_pb2.GpuRequest(count=1),
            cpus=2,
            memory_bytes=1 << 30,
            shm_size_bytes=1 << 20,
            strategy=container_service_pb2.SCALE_STRATEGY_RECREATE,
            snapshots=NEVER,
            **ON,
        ),
        Scale(
            name="a",
            gpus=GpuRequest(count=1),
            cpus=2.0,
            memory_bytes=1 << 30,
            shm_size_bytes=1 << 20,
            strategy=ScaleStrategy.RECREATE,
            snapshots=SnapshotPolicy.NEVER,
            etag="e",
        ),
        container_service_pb2.ScaleContainerRequest(
            gpus=container_pb2.GpuRequest(count=-1),
            cpus=-1,
            memory_bytes=-1,
            shm_size_bytes=-1,
            strategy=9,  # type: ignore[arg-type]  # no such value: refused
            snapshots=9,  # type: ignore[arg-type]  # no such value: refused
            **BAD_ON,
        ),
        {"gpus.count", "cpus", "memory_bytes", "shm_size_bytes", "strategy", "snapshots"},
    ),
    Case(
        container_requests.rollback,
        container_service_pb2.RollbackContainerRequest(revision=MANY - 1, spec_only=True, snapshots=NEVER, **ON),
        Rollback(name="a", revision=MANY - 1, spec_only=True, snapshots=SnapshotPolicy.NEVER, etag="e"),
        container_service_pb2.RollbackContainerRequest(revision=MANY, snapshots=9, **BAD_ON),  # type: ignore[arg-type]  # no such value: refused
        {"revision", "snapshots"},
    ),
    Case(
        container_requests.delete_revision,
        container_service_pb2.DeleteContainerRevisionRequest(revision=1, **ON),
        DeleteRevision(name="a", revision=1, etag="e"),
        container_service_pb2.DeleteContainerRevisionRequest(revision=0, **BAD_ON),
        {"revision"},
    ),
    Case(
        volume_requests.create,
        volume_service_pb2.CreateVolumeRequest(
            name="a",
            size_bytes=1 << 20,
            owner="o",
            labels={"k": "v"},
            backend=volume_pb2.VOLUME_BACKEND_LOOP,
            request_id=UUID,
        ),
        volume_commands.Create(
            name="a", size_bytes=1 << 20, owner="o", labels={"k": "v"}, backend=VolumeBackendKind.LOOP
        ),
        volume_service_pb2.CreateVolumeRequest(
            size_bytes=-1,
            owner="-",
            labels={"-": ""},
            backend=9,  # type: ignore[arg-type]  # no such value: refused
            **BAD_ON,
        ),
        {"size_bytes", "owner", 'labels["-"]', "backend"},
    ),
    Case(
        volume_requests.adopt,
        volume_service_pb2.AdoptVolumeRequest(
            name="a",
            engine_volume="Their.volume",
            size_bytes=1 << 20,
            owner="o",
            labels={"k": "v"},
            backend=volume_pb2.VOLUME_BACKEND_LOOP,
            request_id=UUID,
        ),
        volume_commands.Adopt(
            name="a",
            engine_volume="Their.volume",
            size_bytes=1 << 20,
            owner="o",
            labels={"k": "v"},
            backend=VolumeBackendKind.LOOP,
        ),
        volume_service_pb2.AdoptVolumeRequest(
            engine_volume="-",
            size_bytes=1,
            owner="-",
            labels={"-": ""},
            backend=9,  # type: ignore[arg-type]  # no such value: refused
            **BAD_ON,
        ),
        {"engine_volume", "size_bytes", "owner", 'labels["-"]', "backend"},
    ),
    Case(
        volume_requests.resize,
        volume_service_pb2.ResizeVolumeRequest(size_bytes=1 << 20, **ON),
        volume_commands.Resize(name="a", size_bytes=1 << 20, etag="e"),
        volume_service_pb2.ResizeVolumeRequest(size_bytes=1, **BAD_ON),
        {"size_bytes"},
    ),
    Case(
        volume_requests.delete,
        volume_service_pb2.DeleteVolumeRequest(force=True, **ON),
        volume_commands.Delete(name="a", etag="e", force=True),
        volume_service_pb2.DeleteVolumeRequest(**BAD_ON),
        set(),
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: type(case.command).__name__)


@every_case
def test_all_fields_are_converted(case: Case) -> None:
    assert case.validate(case.good) == case.command


@every_case
def test_all_invalid_fields_are_reported(case: Case) -> None:
    assert set(violations_of(case.validate, case.bad)) == {"name", "request_id"} | case.wrong


def test_an_update_is_converted() -> None:
    request = container_service_pb2.UpdateContainerRequest(
        spec=container_pb2.ContainerSpec(image="debian"),
        files=container_service_pb2.FILES_POLICY_DISCARD,
        pull_policy=container_service_pb2.PULL_POLICY_NEVER,
        registry_auth=registry_auth_pb2.RegistryAuth(username="u", password=SECRET),
        pull_stall_timeout=Duration(seconds=DAY),
        snapshots=NEVER,
        **ON,
    )
    command = container_requests.update(request)
    assert command.change.apply(ContainerSpec(image="busybox", user="me")) == ContainerSpec(image="debian", user="me")
    assert command == Update(
        name="a",
        change=command.change,
        files=FilesPolicy.DISCARD,
        pull_policy=PullPolicy.NEVER,
        registry_auth=RegistryAuth(username="u", password=SECRET),
        pull_stall_seconds=float(DAY),
        snapshots=SnapshotPolicy.NEVER,
        etag="e",
    )
    bad = container_service_pb2.UpdateContainerRequest(
        spec=container_pb2.ContainerSpec(image="B"),
        files=9,  # type: ignore[arg-type]  # no such value: refused
        pull_policy=9,  # type: ignore[arg-type]  # no such value: refused
        registry_auth=BAD_AUTH,
        pull_stall_timeout=Duration(),
        snapshots=9,  # type: ignore[arg-type]  # no such value: refused
        **BAD_ON,
    )
    assert set(violations_of(container_requests.update, bad)) == {
        "name",
        "request_id",
        "spec.image",
        "files",
        "pull_policy",
        *BAD_AUTHS,
        "pull_stall_timeout",
        "snapshots",
    }


def test_a_clone_is_converted() -> None:
    request = container_service_pb2.CloneContainerRequest(
        name="b",
        source="a",
        revision=MANY - 1,
        spec=container_pb2.ContainerSpec(user="me"),
        owner="o",
        create_only=True,
        request_id=UUID,
    )
    command = container_requests.clone(request)
    assert command.change.apply(ContainerSpec(image="busybox")) == ContainerSpec(image="busybox", user="me")
    assert command == Clone(name="b", source="a", revision=MANY - 1, change=command.change, owner="o", create_only=True)
    bad = container_service_pb2.CloneContainerRequest(
        name="B",
        source="A",
        revision=-1,
        spec=container_pb2.ContainerSpec(image="debian", user=":"),
        owner="-",
        request_id="x",
    )
    assert set(violations_of(container_requests.clone, bad)) == {
        "name",
        "source",
        "revision",
        "spec.image",
        "spec.user",
        "owner",
        "request_id",
    }


def test_a_revision_is_requested_by_name_and_number() -> None:
    request = container_service_pb2.GetContainerRevisionRequest
    assert container_requests.get_revision(request(name="a", revision=MANY - 1)) == ("a", MANY - 1)
    assert container_requests.get_revision(request(name="a")) == ("a", 0)
    assert set(violations_of(container_requests.get_revision, request(revision=MANY))) == {"name", "revision"}
    assert set(violations_of(container_requests.get_revision, request(name="a", revision=-1))) == {"revision"}


def test_revisions_are_numbered_from_one() -> None:
    for validate, request in (
        (container_requests.rollback, container_service_pb2.RollbackContainerRequest(name="a")),
        (container_requests.delete_revision, container_service_pb2.DeleteContainerRevisionRequest(name="a")),
    ):
        assert set(violations_of(validate, request)) == {"revision"}


def test_a_volume_is_requested_by_name_which_is_the_default_engine_volume_of_an_adoption() -> None:
    assert volume_requests.get(volume_service_pb2.GetVolumeRequest(name="data")) == "data"
    assert set(violations_of(volume_requests.get, volume_service_pb2.GetVolumeRequest())) == {"name"}
    adopted = volume_requests.adopt(volume_service_pb2.AdoptVolumeRequest(name="data"))
    assert adopted == volume_commands.Adopt(name="data", engine_volume="data")
    assert set(violations_of(volume_requests.resize, volume_service_pb2.ResizeVolumeRequest(name="a"))) == {
        "size_bytes"
    }
    plain = volume_service_pb2.CreateVolumeRequest(name="a", backend=volume_pb2.VOLUME_BACKEND_PLAIN)
    assert volume_requests.create(plain) == volume_commands.Create(name="a", backend=VolumeBackendKind.PLAIN)
    plain.size_bytes = 1 << 20
    assert set(violations_of(volume_requests.create, plain)) == {"backend"}


def test_the_capacity_of_a_host_limits_a_container() -> None:
    host = HostCapacity(cpus=4, memory_bytes=1 << 30)
    most = create_request(cpus=4, memory_bytes=1 << 30, shm_size_bytes=1 << 30)
    tmpfs = container_pb2.TmpfsMount(size_bytes=1 << 30)
    most.spec.mounts.append(container_pb2.Mount(tmpfs=tmpfs, target="/t"))
    assert container_requests.create(most, host).spec.cpus == 4
    more = create_request(cpus=4.01, memory_bytes=(1 << 30) + 1, shm_size_bytes=(1 << 30) + 1)
    more.spec.mounts.append(container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(size_bytes=(1 << 30) + 1), target="/t"))
    found = violations_of(lambda request: container_requests.create(request, host), more)
    assert set(found) == {"spec.cpus", "spec.memory_bytes", "spec.shm_size_bytes", "spec.mounts[0].tmpfs.size_bytes"}
    assert found["spec.cpus"] == "is 4.01; must be 0 or 0.01 to 4, the number of CPUs of this node"
    scale = container_service_pb2.ScaleContainerRequest(
        name="a", cpus=4.01, memory_bytes=(1 << 30) + 1, shm_size_bytes=(1 << 30) + 1
    )
    found = violations_of(lambda request: container_requests.scale(request, host), scale)
    assert set(found) == {"cpus", "memory_bytes", "shm_size_bytes"}
    update = container_service_pb2.UpdateContainerRequest(name="a", spec=container_pb2.ContainerSpec(cpus=5))
    assert set(violations_of(lambda request: container_requests.update(request, host), update)) == {"spec.cpus"}
    clone = container_service_pb2.CloneContainerRequest(name="b", source="a", spec=container_pb2.ContainerSpec(cpus=5))
    assert set(violations_of(lambda request: container_requests.clone(request, host), clone)) == {"spec.cpus"}
    unknown = violations_of(container_requests.create, create_request(cpus=8193))
    assert unknown == {"spec.cpus": "is 8193; must be 0 or 0.01 to 8192"}
