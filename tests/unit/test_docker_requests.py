"""Requests of the Docker adapter: new containers, and changes of their limits."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from gpudock_server.adapters.docker import translate
from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.engine import (
    ContainerDefaults,
    EngineContainerSpec,
    EngineInfo,
    NodeLimits,
    NvidiaSwitch,
)
from gpudock_server.model.spec import (
    ContainerSpec,
    GpuRequest,
    HealthCheck,
    Mount,
    Protocol,
    RestartPolicy,
    RestartPolicyKind,
    TmpfsMount,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.docker_examples import INSPECTED

MIB = 1 << 20
HOST = EngineInfo(
    id="host",
    version="20.10.24",
    api_version="1.41",
    storage_driver="overlay2",
    root_dir="/",
    cpus=8,
    memory_bytes=64 << 30,
)


def engine_spec(
    *,
    gpus: tuple[str, ...] = (),
    spec_gpus: GpuRequest | None = None,
    ports: tuple[PortBinding, ...] = (),
    volumes: dict[str, str] | None = None,
    bound: dict[str, str] | None = None,
    **spec: Any,
) -> EngineContainerSpec:
    return EngineContainerSpec(
        name="web-1",
        image_id="sha256:1",
        spec=ContainerSpec(image="img", gpus=spec_gpus or GpuRequest(), **spec),
        placement=Placement(gpu_uuids=gpus, ports=ports),
        hostname="web",
        labels={"gpudock.uid": "u1"},
        bound=bound or {},
        volumes=volumes or {},
    )


def create_request(*, defaults: ContainerDefaults | None = None, **fields: Any) -> dict[str, Any]:
    return translate.create_request(engine_spec(**fields), defaults or ContainerDefaults())


def visible_devices(request: Mapping[str, Any]) -> list[str]:
    return [entry for entry in request["Env"] if entry.startswith("NVIDIA_VISIBLE_DEVICES=")]


def test_gpus_become_one_device_request() -> None:
    request = create_request(gpus=("GPU-1", "GPU-2"))
    assert request["HostConfig"]["DeviceRequests"] == [
        {"Driver": "nvidia", "DeviceIDs": ["GPU-1", "GPU-2"], "Capabilities": [["gpu"]]}
    ]
    assert visible_devices(request) == ["NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2"]


def test_without_gpus_there_is_no_device_request_and_the_variable_is_void() -> None:
    request = create_request()
    assert "DeviceRequests" not in request["HostConfig"]
    assert visible_devices(request) == ["NVIDIA_VISIBLE_DEVICES=void"]


def test_the_device_request_has_the_placement_and_not_the_count_of_the_spec() -> None:
    request = create_request(gpus=("GPU-1",), spec_gpus=GpuRequest(count=8))
    assert request["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == ["GPU-1"]


_names = st.text(st.characters(codec="ascii", exclude_characters="=\0"), min_size=1)
# Variables of NVIDIA's toolkit that inject devices, each with the value that injects none.
SWITCHES = {
    "NVIDIA_GDS": "disabled",
    "NVIDIA_MOFED": "disabled",
    "NVIDIA_GDRCOPY": "disabled",
    "NVIDIA_NVSWITCH": "disabled",
    "NVIDIA_IMEX_CHANNELS": "",
    "NVIDIA_MIG_CONFIG_DEVICES": "",
    "NVIDIA_MIG_MONITOR_DEVICES": "",
}


@pytest.mark.parametrize("env", [{}, dict.fromkeys(SWITCHES, "enabled"), dict.fromkeys(SWITCHES, "all")])
def test_switches_of_the_toolkit_are_off_for_any_spec(env: dict[str, str]) -> None:
    env_request = dict(line.split("=", 1) for line in create_request(env=env, gpus=("GPU-1",))["Env"])
    assert env_request == {**SWITCHES, "NVIDIA_VISIBLE_DEVICES": "GPU-1"}


def test_an_allowed_switch_keeps_the_value_of_the_spec_or_the_image() -> None:
    defaults = ContainerDefaults(allowed_nvidia_switches=frozenset({NvidiaSwitch.GDS, NvidiaSwitch.MOFED}))
    env = {"NVIDIA_GDS": "enabled", "NVIDIA_NVSWITCH": "enabled"}
    env_request = dict(line.split("=", 1) for line in create_request(env=env, defaults=defaults)["Env"])
    assert env_request["NVIDIA_GDS"] == "enabled"
    assert "NVIDIA_MOFED" not in env_request, "the value of the image is overridden"
    assert env_request["NVIDIA_NVSWITCH"] == "disabled"


@given(
    env=st.dictionaries(_names | st.sampled_from(["NVIDIA_VISIBLE_DEVICES", *SWITCHES]), st.text(max_size=8)),
    gpus=st.lists(st.uuids().map(lambda uuid: f"GPU-{uuid}"), unique=True, max_size=8).map(tuple),
)
def test_no_variable_adds_a_device_or_a_capability(env: dict[str, str], gpus: tuple[str, ...]) -> None:
    request = create_request(env=env, gpus=gpus)
    assert visible_devices(request) == [f"NVIDIA_VISIBLE_DEVICES={','.join(gpus) or 'void'}"]
    others = {name: value for name, value in env.items() if name not in {"NVIDIA_VISIBLE_DEVICES", *SWITCHES}}
    assert {f"{name}={value}" for name, value in others.items()} <= set(request["Env"])
    host = request["HostConfig"]
    assert host["CapDrop"] == ["MKNOD", "NET_RAW"]
    assert not {"Privileged", "CapAdd", "Devices", "DeviceCgroupRules"} & host.keys()
    assert [ids for entry in host.get("DeviceRequests", ()) for ids in entry["DeviceIDs"]] == list(gpus)


def test_a_spec_with_every_field() -> None:
    request = create_request(
        entrypoint=("/init",),
        command=("serve", "--all"),
        env={"A": "b=c"},
        working_dir="/srv",
        user="1000:100",
        tty=True,
        stdin=True,
        labels={"team": "x", "gpudock.uid": "forged"},
        cpus=1.5,
        memory_bytes=64 * MIB,
        shm_size_bytes=128 * MIB,
        stop_signal="SIGINT",
        stop_timeout=timedelta(seconds=1.2),
        health_check=HealthCheck(command=("check", "it"), interval=timedelta(seconds=1.5), retries=2),
        ports=(
            PortBinding(container_port=80, host_port=8080),
            PortBinding(container_port=80, host_port=8081),
            PortBinding(container_port=53, protocol=Protocol.UDP, host_port=5353),
        ),
    )
    host = request.pop("HostConfig")
    labels = request.pop("Labels")
    shown = translate.container(INSPECTED | {"Config": {"Labels": labels}, "HostConfig": host})
    assert shown.spec is not None
    assert (shown.spec.env, shown.spec.stop_timeout) == ({"A": "b=c"}, timedelta(seconds=1.2))
    assert set(shown.ports) == {
        PortBinding(container_port=80, host_port=8080),
        PortBinding(container_port=80, host_port=8081),
        PortBinding(container_port=53, protocol=Protocol.UDP, host_port=5353),
    }
    assert labels == {"team": "x", "gpudock.uid": "u1", "gpudock.spec": shown.spec.model_dump_json()}
    assert request == {
        "Image": "sha256:1",
        "Hostname": "web",
        "User": "1000:100",
        "WorkingDir": "/srv",
        "Env": ["A=b=c", *(f"{name}={value}" for name, value in SWITCHES.items()), "NVIDIA_VISIBLE_DEVICES=void"],
        "Tty": True,
        "OpenStdin": True,
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Entrypoint": ["/init"],
        "Cmd": ["serve", "--all"],
        "StopSignal": "SIGINT",
        "StopTimeout": 2,
        "Healthcheck": {
            "Test": ["CMD", "check", "it"],
            "Interval": 1_500_000_000,
            "Timeout": 30_000_000_000,
            "StartPeriod": 0,
            "Retries": 2,
        },
    }
    assert host["PortBindings"] == {
        "80/tcp": [{"HostPort": "8080"}, {"HostPort": "8081"}],
        "53/udp": [{"HostPort": "5353"}],
    }
    assert host["NanoCpus"] == 1_500_000_000
    assert host["Memory"] == host["MemorySwap"] == 64 * MIB
    assert host["ShmSize"] == 128 * MIB


def test_unset_fields_are_left_to_the_image() -> None:
    request = create_request()
    absent = {"Entrypoint", "Cmd", "StopSignal", "StopTimeout", "Healthcheck"}
    assert not absent & request.keys()
    assert not {"NanoCpus", "Memory", "MemorySwap", "ShmSize"} & request["HostConfig"].keys()


def test_mounts_of_the_spec_and_anonymous_volumes_of_the_predecessor() -> None:
    request = create_request(
        mounts=(
            Mount(volume="data", target="/data", read_only=True),
            Mount(host_path="/srv/models", target="/models"),
            Mount(tmpfs=TmpfsMount(size_bytes=MIB, mode=0o700), target="/scratch"),
            Mount(tmpfs=TmpfsMount(), target="/tmp"),
        ),
        volumes={"/var/lib/db": "anonymous", "/data": "hidden by the mount of the spec"},
        bound={"/srv/models": "/run/bound"},
    )
    assert request["HostConfig"]["Mounts"] == [
        {"Type": "volume", "Source": "data", "Target": "/data", "ReadOnly": True},
        {"Type": "bind", "Source": "/run/bound", "Target": "/models", "ReadOnly": False},
        {
            "Type": "tmpfs",
            "TmpfsOptions": {"Mode": 0o700, "SizeBytes": MIB},
            "Target": "/scratch",
            "ReadOnly": False,
        },
        {"Type": "tmpfs", "TmpfsOptions": {"Mode": 0o1777}, "Target": "/tmp", "ReadOnly": False},
        {"Type": "volume", "Source": "anonymous", "Target": "/var/lib/db", "VolumeOptions": {"NoCopy": True}},
    ]


def test_a_host_path_without_a_bind_is_never_passed_to_the_engine() -> None:
    with pytest.raises(KeyError):
        create_request(mounts=(Mount(host_path="/srv/models", target="/models"),))


@pytest.mark.parametrize(
    ("kind", "name", "retries"),
    [
        (RestartPolicyKind.NO, "no", 0),
        (RestartPolicyKind.ALWAYS, "unless-stopped", 0),
        (RestartPolicyKind.UNLESS_STOPPED, "unless-stopped", 0),
        (RestartPolicyKind.ON_FAILURE, "on-failure", 3),
    ],
)
def test_no_restart_policy_starts_a_stopped_container(kind: RestartPolicyKind, name: str, retries: int) -> None:
    request = create_request(restart_policy=RestartPolicy(kind=kind, max_retry_count=3))
    assert request["HostConfig"]["RestartPolicy"] == {"Name": name, "MaximumRetryCount": retries}


@pytest.mark.parametrize(
    ("has", "cpus", "memory_bytes", "changes"),
    [
        ({}, 0.0, 0, {}),
        ({"NanoCpus": 500_000_000, "Memory": MIB}, 0.5, MIB, {}),
        ({"NanoCpus": 500_000_000}, 2.0, 0, {"NanoCpus": 2_000_000_000}),
        ({}, 0.0, 64 * MIB, {"Memory": 64 * MIB, "MemorySwap": 64 * MIB}),
        ({"NanoCpus": 500_000_000}, 0.0, 0, {"NanoCpus": 8_000_000_000}),
        ({"Memory": MIB}, 0.0, 0, {"Memory": 64 << 30, "MemorySwap": 64 << 30}),
        ({"NanoCpus": 8_000_000_000, "Memory": 64 << 30}, 0.0, 0, {}),
    ],
)
def test_changes_of_cpu_and_memory_limits(
    has: dict[str, int], cpus: float, memory_bytes: int, changes: dict[str, int]
) -> None:
    changed = translate.limit_changes(
        has, cpus=cpus, memory_bytes=memory_bytes, pids_limit=0, host=HOST, limits=NodeLimits()
    )
    assert changed == changes


@pytest.mark.parametrize(
    ("has", "requested", "default", "changes"),
    [
        (None, 0, 4096, {}),
        (-1, 0, 4096, {}),
        (None, 64, 4096, {"PidsLimit": 64}),
        (64, 64, 4096, {}),
        (64, 128, 4096, {"PidsLimit": 128}),
        (64, 0, 4096, {"PidsLimit": 4096}),
        (64, 0, 0, {"PidsLimit": -1}),
    ],
)
def test_changes_of_the_pids_limit(has: int | None, requested: int, default: int, changes: dict[str, int]) -> None:
    limits = NodeLimits(default_pids=default)
    config = {"PidsLimit": has}
    changed = translate.limit_changes(config, cpus=0, memory_bytes=0, pids_limit=requested, host=HOST, limits=limits)
    assert changed == changes


def test_the_maximum_memory_of_a_node_is_also_the_default() -> None:
    limits = NodeLimits(max_memory_bytes=MIB)
    has = {"Memory": 2 * MIB}
    changed = translate.limit_changes(has, cpus=0, memory_bytes=0, pids_limit=0, host=HOST, limits=limits)
    assert changed == {"Memory": MIB, "MemorySwap": MIB}
    host = create_request(defaults=ContainerDefaults(limits=limits))["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (MIB, MIB, 4096)
    assert create_request(defaults=ContainerDefaults(limits=limits), memory_bytes=7)["HostConfig"]["Memory"] == 7


def test_defaults_of_the_node() -> None:
    host = create_request()["HostConfig"]
    assert (host["CapDrop"], host["PidsLimit"]) == (["MKNOD", "NET_RAW"], 4096)
    assert not {"Memory", "SecurityOpt"} & host.keys()
    assert create_request(pids_limit=64)["HostConfig"]["PidsLimit"] == 64
    other = ContainerDefaults(limits=NodeLimits(default_pids=0), drop_net_raw=False, no_new_privileges=True)
    host = create_request(defaults=other)["HostConfig"]
    assert (host["CapDrop"], host["SecurityOpt"]) == (["MKNOD"], ["no-new-privileges"])
    assert "PidsLimit" not in host
