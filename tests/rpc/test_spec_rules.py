"""Every rule of ContainerSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from gpudock.v1 import (
    container_pb2,
)
from gpudock_server.rpc.containers import requests as container_requests

from tests.rpc.request_examples import DAY, create_request, mount, port, violations_of

BAD_SPECS: Mapping[str, tuple[dict[str, Any], str]] = {
    "no image": ({"image": ""}, "spec.image"),
    "image with a space": ({"image": "busy box"}, "spec.image"),
    "image in capitals": ({"image": "Busybox"}, "spec.image"),
    "long image": ({"image": "a" * 513}, "spec.image"),
    "NUL in an argument": ({"command": ["a", "b\0"]}, "spec.command[1]"),
    "NUL in the entrypoint": ({"entrypoint": ["\0"]}, "spec.entrypoint[0]"),
    "empty program in the entrypoint": ({"entrypoint": ["", "a"]}, "spec.entrypoint[0]"),
    "empty program": ({"command": ["", "a"]}, "spec.command[0]"),
    "empty program behind no entrypoint": ({"entrypoint": [""], "command": [""]}, "spec.command[0]"),
    "too many arguments": ({"entrypoint": ["a"] * 1000, "command": ["a"] * 25}, "spec.command"),
    "too long arguments": ({"command": ["a" * (256 * 1024 + 1)]}, "spec.command"),
    "env name with =": ({"env": {"A=B": ""}}, 'spec.env["A=B"]'),
    "env name empty": ({"env": {"": "x"}}, 'spec.env[""]'),
    "env name too long": ({"env": {"A" * 256: "x"}}, f'spec.env["{"A" * 60}…"]'),
    "env value with NUL": ({"env": {"A": "\0"}}, 'spec.env["A"]'),
    "too much env": ({"env": {"A": "x" * 256 * 1024}}, "spec.env"),
    "too many env": ({"env": {f"A{n}": "" for n in range(1025)}}, "spec.env"),
    "relative working_dir": ({"working_dir": "tmp"}, "spec.working_dir"),
    "NUL in working_dir": ({"working_dir": "/\0"}, "spec.working_dir"),
    "user of three": ({"user": "a:b:c"}, "spec.user"),
    "user with a space": ({"user": "a b"}, "spec.user"),
    "user too high": ({"user": "2147483648"}, "spec.user"),
    "hostname empty": ({"hostname": ""}, "spec.hostname"),
    "hostname with _": ({"hostname": "a_b"}, "spec.hostname"),
    "hostname too long": ({"hostname": "a" * 64}, "spec.hostname"),
    "label key": ({"labels": {"-a": ""}}, 'spec.labels["-a"]'),
    "label of ours": ({"labels": {"gpudock.uid": ""}}, 'spec.labels["gpudock.uid"]'),
    "label value too long": ({"labels": {"a": "é" * 513}}, 'spec.labels["a"]'),
    "too many labels": ({"labels": {f"a{n}": "" for n in range(65)}}, "spec.labels"),
    "negative gpus": ({"gpus": container_pb2.GpuRequest(count=-1)}, "spec.gpus.count"),
    "too many gpus": ({"gpus": container_pb2.GpuRequest(count=17)}, "spec.gpus.count"),
    "too many uuids": ({"gpus": container_pb2.GpuRequest(uuids=[f"GPU-{n}" for n in range(17)])}, "spec.gpus.uuids"),
    "gpu twice": ({"gpus": container_pb2.GpuRequest(uuids=["GPU-1", "GPU-1"])}, "spec.gpus.uuids[1]"),
    "gpu without a name": ({"gpus": container_pb2.GpuRequest(uuids=[""])}, "spec.gpus.uuids[0]"),
    "count with uuids": ({"gpus": container_pb2.GpuRequest(count=2, uuids=["GPU-1"])}, "spec.gpus.count"),
    "model with uuids": ({"gpus": container_pb2.GpuRequest(model="a", uuids=["GPU-1"])}, "spec.gpus.model"),
    "memory with uuids": (
        {"gpus": container_pb2.GpuRequest(min_memory_bytes=1, uuids=["GPU-1"])},
        "spec.gpus.min_memory_bytes",
    ),
    "long model": ({"gpus": container_pb2.GpuRequest(count=1, model="a" * 97)}, "spec.gpus.model"),
    "negative gpu memory": ({"gpus": container_pb2.GpuRequest(min_memory_bytes=-1)}, "spec.gpus.min_memory_bytes"),
    "cpus nan": ({"cpus": float("nan")}, "spec.cpus"),
    "cpus inf": ({"cpus": float("inf")}, "spec.cpus"),
    "cpus negative": ({"cpus": -1.0}, "spec.cpus"),
    "cpus too few": ({"cpus": 0.009}, "spec.cpus"),
    "memory too small": ({"memory_bytes": 6291455}, "spec.memory_bytes"),
    "memory negative": ({"memory_bytes": -1}, "spec.memory_bytes"),
    "processes too few": ({"pids_limit": 15}, "spec.pids_limit"),
    "processes negative": ({"pids_limit": -1}, "spec.pids_limit"),
    "processes too many": ({"pids_limit": 4194305}, "spec.pids_limit"),
    "shm too small": ({"shm_size_bytes": 4095}, "spec.shm_size_bytes"),
    "too many mounts": ({"mounts": [mount(target=f"/{n}") for n in range(65)]}, "spec.mounts"),
    "mount of nothing": ({"mounts": [container_pb2.Mount(target="/data")]}, "spec.mounts[0].source"),
    "target twice": ({"mounts": [mount(), mount()]}, "spec.mounts[1].target"),
    "target /": ({"mounts": [mount(target="/")]}, "spec.mounts[0].target"),
    "target with ..": ({"mounts": [mount(target="/a/../b")]}, "spec.mounts[0].target"),
    "target with //": ({"mounts": [mount(target="/a//b")]}, "spec.mounts[0].target"),
    "target that is relative": ({"mounts": [mount(target="a")]}, "spec.mounts[0].target"),
    "target that requests a device": (
        {"mounts": [mount(target="/var/run/nvidia-container-devices/all")]},
        "spec.mounts[0].target",
    ),
    "target that requests a device by its beginning": (
        {"mounts": [mount(target="/run/nvidia-container-devicesall")]},
        "spec.mounts[0].target",
    ),
    "target too long": ({"mounts": [mount(target="/" + "a" * 4095)]}, "spec.mounts[0].target"),
    "volume's name": ({"mounts": [mount(volume="a/b")]}, "spec.mounts[0].volume"),
    "host path that is relative": (
        {"mounts": [container_pb2.Mount(host_path="a", target="/a")]},
        "spec.mounts[0].host_path",
    ),
    "read-only tmpfs": (
        {"mounts": [container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(), target="/a", read_only=True)]},
        "spec.mounts[0].read_only",
    ),
    "tmpfs size": (
        {"mounts": [container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(size_bytes=-1), target="/a")]},
        "spec.mounts[0].tmpfs.size_bytes",
    ),
    "tmpfs mode": (
        {"mounts": [container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(mode=0o10000), target="/a")]},
        "spec.mounts[0].tmpfs.mode",
    ),
    "too many ports": ({"ports": [port(n) for n in range(1, 34)]}, "spec.ports"),
    "no container port": ({"ports": [port(0)]}, "spec.ports[0].container_port"),
    "container port too high": ({"ports": [port(65536)]}, "spec.ports[0].container_port"),
    "host port negative": ({"ports": [port(80, -1)]}, "spec.ports[0].host_port"),
    "container port twice": ({"ports": [port(80), port(80, 1)]}, "spec.ports[1].container_port"),
    "host port twice": ({"ports": [port(80, 8080), port(81, 8080)]}, "spec.ports[1].host_port"),
    "unknown protocol": ({"ports": [port(80, 0, 9)]}, "spec.ports[0].protocol"),
    "unknown policy": ({"restart_policy": container_pb2.RestartPolicy(policy=9)}, "spec.restart_policy.policy"),  # type: ignore[arg-type]  # no such value: refused
    "retries without on-failure": (
        {"restart_policy": container_pb2.RestartPolicy(max_retry_count=1)},
        "spec.restart_policy.max_retry_count",
    ),
    "negative retries": (
        {"restart_policy": container_pb2.RestartPolicy(max_retry_count=-1)},
        "spec.restart_policy.max_retry_count",
    ),
    "unknown signal": ({"stop_signal": "SIGBOGUS"}, "spec.stop_signal"),
    "stop timeout negative": ({"stop_timeout": Duration(seconds=-1)}, "spec.stop_timeout"),
    "stop timeout too long": ({"stop_timeout": Duration(seconds=DAY, nanos=1)}, "spec.stop_timeout"),
    "stop timeout of two signs": ({"stop_timeout": Duration(seconds=1, nanos=-1)}, "spec.stop_timeout"),
    "stop timeout not normal": ({"stop_timeout": Duration(nanos=1_000_000_000)}, "spec.stop_timeout"),
    "check interval": (
        {"health_check": container_pb2.HealthCheck(interval=Duration(nanos=999_999))},
        "spec.health_check.interval",
    ),
    "check without a program": (
        {"health_check": container_pb2.HealthCheck(command=[""])},
        "spec.health_check.command[0]",
    ),
    "check retries": ({"health_check": container_pb2.HealthCheck(retries=-1)}, "spec.health_check.retries"),
    "too large as JSON": (
        {"env": {"A": "x" * 200_000}, "command": ["y" * 100_000]},
        "spec",
    ),
}


@pytest.mark.parametrize(("fields", "field"), BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_a_spec_that_violates_one_rule_is_refused(fields: dict[str, Any], field: str) -> None:
    assert set(violations_of(container_requests.create, create_request(**fields))) == {field}


@pytest.mark.parametrize(
    "image",
    [
        "busybox",
        "a/b/c:1.2-x_y",
        "localhost:5000/a",
        "[::1]:5000/a",
        "Example.COM/a__b/c---d",
        "a@sha256:" + "0" * 64,
        "sha256:" + "f" * 64,
        "f" * 64,
        "sha256:c0ffee",
    ],
)
def test_valid_images_are_accepted(image: str) -> None:
    assert container_requests.create(create_request(image=image)).spec.image == image


@pytest.mark.parametrize(
    "image", ["/a", "a/", "a:", "a::b", "a@", "a@sha256:12", "-a", "a b", "a\n", "é", "http://a/b"]
)
def test_invalid_images_are_refused(image: str) -> None:
    assert set(violations_of(container_requests.create, create_request(image=image))) == {"spec.image"}
