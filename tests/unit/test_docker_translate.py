"""The pure parts of the Docker adapter: requests, responses, events, errors, addresses and pull progress."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiodocker import DockerError
from gpudock_server.adapters.docker import translate
from gpudock_server.adapters.docker.address import EngineAddress
from gpudock_server.adapters.docker.connection import path_segment
from gpudock_server.adapters.docker.events import engine_event
from gpudock_server.adapters.docker.failures import engine_errors, start_failure
from gpudock_server.adapters.docker.pull import PullProgress, auth_header
from gpudock_server.errors import EngineRejected, EngineUnavailable, PortInUse, StartFailed
from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.engine import (
    ContainerDefaults,
    EngineContainerSpec,
    EngineEventKind,
    EngineInfo,
    EngineState,
    NodeLimits,
    NvidiaSwitch,
    RegistryAuth,
)
from gpudock_server.model.image_reference import split_reference
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


def created(*, defaults: ContainerDefaults | None = None, **fields: Any) -> dict[str, Any]:
    return translate.create_request(engine_spec(**fields), defaults or ContainerDefaults())


def visible(request: Mapping[str, Any]) -> list[str]:
    return [entry for entry in request["Env"] if entry.startswith("NVIDIA_VISIBLE_DEVICES=")]


# ---- an EngineContainerSpec becomes a request ----


def test_cards_become_one_device_request() -> None:
    request = created(gpus=("GPU-1", "GPU-2"))
    assert request["HostConfig"]["DeviceRequests"] == [
        {"Driver": "nvidia", "DeviceIDs": ["GPU-1", "GPU-2"], "Capabilities": [["gpu"]]}
    ]
    assert visible(request) == ["NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2"]


def test_without_cards_nothing_is_requested_and_the_variable_says_void() -> None:
    request = created()
    assert "DeviceRequests" not in request["HostConfig"]
    assert visible(request) == ["NVIDIA_VISIBLE_DEVICES=void"]


def test_what_a_spec_asks_for_is_not_what_is_requested() -> None:
    request = created(gpus=("GPU-1",), spec_gpus=GpuRequest(count=8))
    assert request["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == ["GPU-1"]


_names = st.text(st.characters(codec="ascii", exclude_characters="=\0"), min_size=1)
# Variables of NVIDIA's toolkit that add devices, each with the value that adds none.
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
def test_switches_of_the_toolkit_are_off_whatever_the_spec_says(env: dict[str, str]) -> None:
    said = dict(line.split("=", 1) for line in created(env=env, gpus=("GPU-1",))["Env"])
    assert said == {**SWITCHES, "NVIDIA_VISIBLE_DEVICES": "GPU-1"}


def test_an_allowed_switch_is_the_users() -> None:
    defaults = ContainerDefaults(allowed_nvidia_switches=frozenset({NvidiaSwitch.GDS, NvidiaSwitch.MOFED}))
    env = {"NVIDIA_GDS": "enabled", "NVIDIA_NVSWITCH": "enabled"}
    said = dict(line.split("=", 1) for line in created(env=env, defaults=defaults)["Env"])
    assert said["NVIDIA_GDS"] == "enabled"
    assert "NVIDIA_MOFED" not in said, "the image's own value counts"
    assert said["NVIDIA_NVSWITCH"] == "disabled"


@given(
    env=st.dictionaries(_names | st.sampled_from(["NVIDIA_VISIBLE_DEVICES", *SWITCHES]), st.text(max_size=8)),
    gpus=st.lists(st.uuids().map(lambda uuid: f"GPU-{uuid}"), unique=True, max_size=8).map(tuple),
)
def test_no_environment_widens_what_was_claimed(env: dict[str, str], gpus: tuple[str, ...]) -> None:
    request = created(env=env, gpus=gpus)
    assert visible(request) == [f"NVIDIA_VISIBLE_DEVICES={','.join(gpus) or 'void'}"]
    others = {name: value for name, value in env.items() if name not in {"NVIDIA_VISIBLE_DEVICES", *SWITCHES}}
    assert {f"{name}={value}" for name, value in others.items()} <= set(request["Env"])
    host = request["HostConfig"]
    assert host["CapDrop"] == ["MKNOD", "NET_RAW"]
    assert not {"Privileged", "CapAdd", "Devices", "DeviceCgroupRules"} & host.keys()
    assert [ids for entry in host.get("DeviceRequests", ()) for ids in entry["DeviceIDs"]] == list(gpus)


def test_everything_a_spec_can_say() -> None:
    request = created(
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
    kept = translate.container(INSPECTED | {"Config": {"Labels": labels}, "HostConfig": host})
    assert kept.spec is not None
    assert (kept.spec.env, kept.spec.stop_timeout) == ({"A": "b=c"}, timedelta(seconds=1.2))
    assert set(kept.ports) == {
        PortBinding(container_port=80, host_port=8080),
        PortBinding(container_port=80, host_port=8081),
        PortBinding(container_port=53, protocol=Protocol.UDP, host_port=5353),
    }
    assert labels == {"team": "x", "gpudock.uid": "u1", "gpudock.spec": kept.spec.model_dump_json()}
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


def test_what_is_not_said_is_left_to_the_image() -> None:
    request = created()
    absent = {"Entrypoint", "Cmd", "StopSignal", "StopTimeout", "Healthcheck"}
    assert not absent & request.keys()
    assert not {"NanoCpus", "Memory", "MemorySwap", "ShmSize"} & request["HostConfig"].keys()


def test_mounts_and_the_volumes_of_a_predecessor() -> None:
    request = created(
        mounts=(
            Mount(volume="data", target="/data", read_only=True),
            Mount(host_path="/srv/models", target="/models"),
            Mount(tmpfs=TmpfsMount(size_bytes=MIB, mode=0o700), target="/scratch"),
            Mount(tmpfs=TmpfsMount(), target="/tmp"),
        ),
        volumes={"/var/lib/db": "anonymous", "/data": "shadowed by the user's own"},
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


def test_a_host_path_that_is_not_bound_is_never_given_to_the_engine() -> None:
    with pytest.raises(KeyError):
        created(mounts=(Mount(host_path="/srv/models", target="/models"),))


@pytest.mark.parametrize(
    ("kind", "name", "retries"),
    [
        (RestartPolicyKind.NO, "no", 0),
        (RestartPolicyKind.ALWAYS, "unless-stopped", 0),
        (RestartPolicyKind.UNLESS_STOPPED, "unless-stopped", 0),
        (RestartPolicyKind.ON_FAILURE, "on-failure", 3),
    ],
)
def test_no_policy_brings_back_what_was_stopped(kind: RestartPolicyKind, name: str, retries: int) -> None:
    request = created(restart_policy=RestartPolicy(kind=kind, max_retry_count=3))
    assert request["HostConfig"]["RestartPolicy"] == {"Name": name, "MaximumRetryCount": retries}


# ---- limits that change in place ----


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
def test_limits(has: dict[str, int], cpus: float, memory_bytes: int, changes: dict[str, int]) -> None:
    changed = translate.limit_changes(
        has, cpus=cpus, memory_bytes=memory_bytes, pids_limit=0, host=HOST, limits=NodeLimits()
    )
    assert changed == changes


@pytest.mark.parametrize(
    ("has", "asked", "default", "changes"),
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
def test_limits_of_processes(has: int | None, asked: int, default: int, changes: dict[str, int]) -> None:
    limits = NodeLimits(default_pids=default)
    config = {"PidsLimit": has}
    changed = translate.limit_changes(config, cpus=0, memory_bytes=0, pids_limit=asked, host=HOST, limits=limits)
    assert changed == changes


def test_a_nodes_maximum_of_memory_is_the_default_too() -> None:
    limits = NodeLimits(max_memory_bytes=MIB)
    has = {"Memory": 2 * MIB}
    changed = translate.limit_changes(has, cpus=0, memory_bytes=0, pids_limit=0, host=HOST, limits=limits)
    assert changed == {"Memory": MIB, "MemorySwap": MIB}
    host = created(defaults=ContainerDefaults(limits=limits))["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (MIB, MIB, 4096)
    assert created(defaults=ContainerDefaults(limits=limits), memory_bytes=7)["HostConfig"]["Memory"] == 7


def test_defaults_of_the_node() -> None:
    host = created()["HostConfig"]
    assert (host["CapDrop"], host["PidsLimit"]) == (["MKNOD", "NET_RAW"], 4096)
    assert not {"Memory", "SecurityOpt"} & host.keys()
    assert created(pids_limit=64)["HostConfig"]["PidsLimit"] == 64
    other = ContainerDefaults(limits=NodeLimits(default_pids=0), drop_net_raw=False, no_new_privileges=True)
    host = created(defaults=other)["HostConfig"]
    assert (host["CapDrop"], host["SecurityOpt"]) == (["MKNOD"], ["no-new-privileges"])
    assert "PidsLimit" not in host


# ---- what the engine shows ----

INSPECTED: dict[str, Any] = {
    "Id": "c0ffee",
    "Name": "/web-1",
    "Image": "sha256:1",
    "RestartCount": 2,
    "State": {
        "Status": "exited",
        "Running": False,
        "Pid": 0,
        "ExitCode": 137,
        "OOMKilled": True,
        "Error": "",
        "StartedAt": "2026-01-02T03:04:05.123456789Z",
        "FinishedAt": "2026-01-02T04:04:05+01:00",
        "Health": {"Status": "unhealthy"},
    },
    "Config": {"Labels": {"gpudock.uid": "u1"}},
    "HostConfig": {
        "NanoCpus": 250_000_000,
        "Memory": MIB,
        "DeviceRequests": [{"Driver": "nvidia", "DeviceIDs": ["GPU-1"], "Capabilities": [["gpu"]]}],
    },
    "GraphDriver": {"Name": "overlay2", "Data": {"UpperDir": "/var/lib/docker/overlay2/x/diff"}},
    "Mounts": [
        {"Type": "volume", "Name": "v1", "Destination": "/data"},
        {"Type": "bind", "Source": "/x", "Destination": "/y"},
    ],
}


def test_inspect() -> None:
    seen = translate.container(INSPECTED)
    assert (seen.id, seen.name, seen.image_id) == ("c0ffee", "web-1", "sha256:1")
    assert (seen.state, seen.exit_code, seen.oom_killed) == (EngineState.EXITED, 137, True)
    assert seen.gpu_uuids == ("GPU-1",)
    assert (seen.spec, seen.ports) == (None, ())
    assert seen.upper_dir == "/var/lib/docker/overlay2/x/diff"
    assert seen.volumes == {"/data": "v1"}
    assert (seen.cpus, seen.memory_bytes, seen.restart_count, seen.health) == (0.25, MIB, 2, "unhealthy")
    assert seen.start_time == datetime(2026, 1, 2, 3, 4, 5, 123456, UTC)
    assert seen.finish_time == datetime(2026, 1, 2, 3, 4, 5, 0, UTC)


@pytest.mark.parametrize(
    "driver", [None, {}, {"Name": "overlayfs"}, {"Name": "btrfs", "Data": {"UpperDir": "/no"}}, {"Name": "overlay2"}]
)
def test_no_upper_folder_where_the_engine_shows_none(driver: object) -> None:
    assert translate.container(INSPECTED | {"GraphDriver": driver}).upper_dir == ""


def test_inspect_of_an_engine_that_leaves_out_what_it_can() -> None:
    seen = translate.container(
        {"Id": "1", "Name": "/n", "Image": "i", "State": {"Status": "new word", "Running": True}}
    )
    assert seen.state is EngineState.RUNNING
    assert seen.gpu_uuids == ()
    assert seen.start_time is None


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "0001-01-01T00:00:00+05:00", "", None])
def test_zero_time_is_none(text: str | None) -> None:
    assert translate.parse_time(text) is None


@given(st.datetimes(min_value=datetime(1970, 1, 1), timezones=st.timezones()), st.integers(0, 999))  # noqa: DTZ001 - hypothesis wants its bounds naive
def test_any_time_survives(moment: datetime, nanos: int) -> None:
    offset = moment.utcoffset() or timedelta(0)
    if offset % timedelta(minutes=1):
        return
    text = moment.isoformat(timespec="microseconds")
    with_nanos = f"{text[:26]}{nanos:03}{text[26:]}"
    assert translate.parse_time(with_nanos) == moment.astimezone(UTC)


# ---- events ----


def test_event() -> None:
    event = engine_event(
        {
            "Action": "health_status: healthy",
            "Actor": {"ID": "c1", "Attributes": {"gpudock.uid": "u", "name": "n", "exitCode": "1"}},
            "timeNano": 5,
        }
    )
    assert event is not None
    assert (event.kind, event.engine_id, event.time_nanos) == (EngineEventKind.HEALTH, "c1", 5)
    assert event.labels == {"gpudock.uid": "u"}


@pytest.mark.parametrize("document", [{}, {"Action": "exec_create: sh", "Actor": {"ID": "c1"}}, {"Action": "start"}])
def test_events_that_mean_nothing(document: dict[str, Any]) -> None:
    assert engine_event(document) is None


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DockerError(404, "no such thing"), EngineRejected),
        (DockerError(500, "driver failed"), EngineRejected),
        (DockerError(900, "Cannot connect"), EngineUnavailable),
        (DockerError(502, "bad gateway"), EngineUnavailable),
        (DockerError(500, "dial unix /run/containerd/containerd.sock: connect: refused"), EngineUnavailable),
        (TimeoutError(), EngineUnavailable),
        (aiohttp.ServerDisconnectedError(), EngineUnavailable),
        (aiohttp.ClientPayloadError("cut off"), EngineUnavailable),
        (ConnectionRefusedError(), EngineUnavailable),
        (json.JSONDecodeError("x", "", 0), EngineUnavailable),
        (KeyError("Id"), EngineUnavailable),
    ],
)
def test_every_failure_has_one_meaning(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised, engine_errors("do it"):
        raise error
    assert raised.value.__cause__ is error
    assert "do it" in str(raised.value)


BINDINGS = {"HostConfig": {"PortBindings": {"53/udp": [{"HostPort": "8080"}], "9/tcp": None}}}
_FAILED = "driver failed programming external connectivity on endpoint web-1 (c21ca): "


@pytest.mark.parametrize(
    ("message", "port", "protocol"),
    [
        (_FAILED + "Bind for 0.0.0.0:8080 failed: port is already allocated", 8080, "udp"),
        (_FAILED + "Bind for 0.0.0.0:8081 failed: port is already allocated", 8081, "tcp"),
        (_FAILED + "Bind for :::8081 failed: port is already allocated", 8081, "tcp"),
        (
            _FAILED + "Error starting userland proxy: listen udp4 0.0.0.0:53: bind: address already in use",
            53,
            "udp",
        ),
        (_FAILED + "Error starting userland proxy: listen tcp6 [::]:80: bind: address already in use", 80, "tcp"),
        ("failed to bind host port for 0.0.0.0:80:172.17.0.2:8080/tcp: address already in use", 80, "tcp"),
        ("failed to bind host port 0.0.0.0:80/udp: address already in use", 80, "udp"),
        ("address already in use", 0, "tcp"),
    ],
)
def test_a_port_that_is_taken(message: str, port: int, protocol: str) -> None:
    failure = start_failure(EngineRejected(call="start", status=500, detail=message), BINDINGS)
    assert isinstance(failure, PortInUse)
    assert (failure.host_port, failure.protocol) == (port, protocol)


@pytest.mark.parametrize(
    ("container", "name"),
    [({"Config": {"Labels": {"gpudock.name": "web"}}}, "web"), ({"Name": "/web-1"}, "web-1"), ({"Id": "c1"}, "c1")],
)
def test_any_other_failed_start(container: dict[str, Any], name: str) -> None:
    failure = start_failure(EngineRejected(call="start", status=400, detail="no such file"), container)
    assert isinstance(failure, StartFailed)
    assert (failure.container, failure.detail) == (name, "no such file")


# ---- addresses and names ----


@pytest.mark.parametrize(
    ("url", "http_url"),
    [
        ("unix:///run/docker.sock", "http://localhost"),
        ("tcp://10.0.0.1", "http://10.0.0.1:2375"),
        ("tcp://[fd00::1]:99", "http://[fd00::1]:99"),
        ("https://engine.example", "https://engine.example:2376"),
    ],
)
def test_addresses(url: str, http_url: str) -> None:
    assert EngineAddress.parse(url, None).http_url == http_url


@pytest.mark.parametrize("url", ["", "/run/docker.sock", "unix://run/docker.sock", "unix:x", "ssh://host", "tcp://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="engine address"):
        EngineAddress.parse(url, None)


def test_an_incomplete_tls_folder(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    with pytest.raises(ValueError, match=r"is missing cert\.pem, key\.pem"):
        EngineAddress.parse("tcp://host", tmp_path)
    with pytest.raises(ValueError, match="no TLS"):
        EngineAddress.parse("unix:///x", tmp_path)
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(
        ValueError, match=r"key\.pem is accessible to every user of this host \(mode 0644\); .*chmod 600"
    ):
        EngineAddress.parse("tcp://host", tmp_path)


@given(st.text(max_size=8))
def test_a_name_never_leaves_its_segment(text: str) -> None:
    try:
        assert not set(path_segment(text)) & set("/?#%\\ \n")
        assert text not in (".", "..")
    except EngineRejected:
        pass


# ---- pulling ----


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("busybox", ("busybox", "latest")),
        ("busybox:1", ("busybox", "1")),
        ("host:5000/a/b", ("host:5000/a/b", "latest")),
        ("host:5000/a/b:c", ("host:5000/a/b", "c")),
        ("a@sha256:00", ("a", "sha256:00")),
    ],
)
def test_references(reference: str, parts: tuple[str, str]) -> None:
    assert split_reference(reference) == parts


def test_credentials() -> None:
    plain = RegistryAuth(username="ü", password="p?>")  # noqa: S106 - nobody's
    decoded = json.loads(base64.urlsafe_b64decode(auth_header(plain)))
    assert decoded == {"username": "ü", "password": "p?>"}
    by_token = RegistryAuth(identity_token="t", server_address="r")  # noqa: S106 - nobody's
    token = json.loads(base64.urlsafe_b64decode(auth_header(by_token)))
    assert token == {"identitytoken": "t", "serveraddress": "r"}


def test_layers_become_one_progress() -> None:
    layers = PullProgress()

    def take(layer: str, status: str, current: int = 0, total: int = 0) -> tuple[bool, int, int]:
        detail = {"current": current, "total": total} if total else {}
        changed = layers.update({"id": layer, "status": status, "progressDetail": detail})
        return changed, layers.current, layers.total

    assert take("", "Pulling from x") == (True, 0, 0)
    assert take("a", "Pulling fs layer") == (True, 0, 0)
    # Countdowns and repeated reports are no progress.
    assert take("a", "Waiting") == (False, 0, 0)
    assert take("a", "Retrying in 5 seconds") == (False, 0, 0)
    assert take("a", "Retrying in 4 seconds") == (False, 0, 0)
    assert take("a", "Downloading", 10, 100) == (True, 10, 100)
    assert take("a", "Downloading", 10, 100) == (False, 10, 100)
    assert take("b", "Downloading", 5, 50) == (True, 15, 150)
    assert take("a", "Downloading", 3, 100) == (True, 15, 150)
    assert take("a", "Download complete") == (True, 105, 150)
    assert take("a", "Extracting", 1, 100) == (True, 105, 150)
    assert take("b", "Pull complete") == (True, 150, 150)
    assert take("c", "Already exists") == (True, 150, 150)
