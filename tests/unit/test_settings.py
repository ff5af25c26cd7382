"""Which settings are valid, alone and together."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from gpudock_server.model.names import is_name
from gpudock_server.settings.definitions import LayerTransferChoice, Settings, default_host_id, default_node_name
from gpudock_server.settings.value_types import PortRange, is_loopback, split_address
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

TLS = {"tls_cert": "/tls/cert.pem", "tls_key": "/tls/key.pem"}
TOKENS = {"token_file": "/etc/gpudock/tokens"}


def make(**values: Any) -> Settings:
    return Settings(**values)


def problems(**values: Any) -> str:
    with pytest.raises(ValidationError) as raised:
        make(**values)
    return "\n".join(error["msg"] for error in raised.value.errors())


def test_the_defaults_are_valid_and_allow_no_remote_access() -> None:
    settings = make()
    assert settings.socket == Path("/run/gpudock/gpudock.sock")
    assert settings.socket_mode == 0o660
    assert settings.listen == ()
    assert settings.allowed_host_paths == ()


def test_settings_are_frozen_and_do_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUDOCK_MAX_EXECS", "7")
    settings = make()
    assert settings.max_execs == 512
    with pytest.raises(ValidationError):
        settings.max_execs = 7  # type: ignore[misc] # the model is frozen


def test_every_setting_is_documented() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("5", 5), (5, 5), (0.5, 0.5), ("500ms", 0.5), ("2m", 120), ("24h", 86400), ("1.5d", 129600)]
)
def test_durations_have_units(text: object, seconds: float) -> None:
    assert make(operation_retention=86400, engine_timeout=text).engine_timeout == seconds


@pytest.mark.parametrize("text", ["", "-1", "0", 0, -1, "5 minutes", "1e3", True, float("inf"), float("nan"), None])
def test_invalid_durations_are_refused(text: object) -> None:
    assert problems(engine_timeout=text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64G", 64 << 30), ("64GiB", 64 << 30), ("64gb", 64 << 30), ("6291456", 6 << 20), (6 << 20, 6 << 20)],
)
def test_sizes_have_units(text: object, size: int) -> None:
    assert make(max_memory=text).max_memory == size


def test_the_quota_of_etcd_is_a_size_with_a_minimum() -> None:
    assert make(etcd_quota="64MiB").etcd_quota == 64 << 20
    assert "greater than or equal to 16777216" in str(problems(etcd_quota="15M"))


def test_lists_are_written_with_commas() -> None:
    settings = make(allowed_host_paths="/data, /srv/models", etcd_endpoints="a:2379,b:2379", etcd_ca="/ca.pem")
    assert settings.allowed_host_paths == (Path("/data"), Path("/srv/models"))
    assert settings.etcd_endpoints == ("a:2379", "b:2379")


@pytest.mark.parametrize("name", ["state_dir", "socket", "tls_cert", "token_file", "docker_tls_dir", "etcd_ca"])
@pytest.mark.parametrize("path", ["run/x", "./x", "/a/../b", "~/x", "~"])
def test_relative_paths_are_refused(name: str, path: str) -> None:
    assert "must be an absolute path" in problems(**{name: path})
    assert "must be an absolute path" in problems(allowed_host_paths=["/ok", path])


@pytest.mark.parametrize("text", ["20000", "5-1", "0-10", "1-65536", "-5", "a-b", "1-2-3", 20000, "", "٢-٣"])
def test_bad_port_ranges_are_refused(text: object) -> None:
    assert "must be FIRST-LAST" in problems(port_range=text)


def test_a_port_range_contains_its_ports() -> None:
    ports = make(port_range="20000-20002").port_range
    assert [port for port in range(19999, 20005) if port in ports] == [20000, 20001, 20002]
    assert (len(ports), ports.first, ports.last, ports) == (3, 20000, 20002, PortRange(20000, 20002))


@pytest.mark.parametrize("mode", ["0666", "0777", "0440", "rw", 660, 0o666, "", True])
def test_modes_other_than_0600_and_0660_are_refused(mode: object) -> None:
    assert 'must be "0600"' in problems(socket_mode=mode)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"listen": "0.0.0.0:1"}, "listen: authentication required"),
        ({"listen": "0.0.0.0:1", **TOKENS}, "0.0.0.0:1 is not loopback"),
        ({"listen": "gpu1.example:1", **TOKENS}, "gpu1.example:1 is not loopback"),
        ({"listen": "[::]:1", **TOKENS}, "[::]:1 is not loopback"),
        ({"listen": "127.0.0.1:1"}, "listen: authentication required"),
        ({"listen": "127.0.0.1:1", **TLS}, "listen: authentication required"),
        ({"listen": "127.0.0.1:25000", **TOKENS}, "port 25000 is in port_range 20000-29999"),
        (
            {"listen": "127.0.0.1:8085", "pinned_port_ranges": "443-443,8080-8090", **TOKENS},
            "port 8085 is in 8080-8090 of pinned_port_ranges",
        ),
        ({"pinned_port_ranges": "443"}, "must be FIRST-LAST"),
        ({"listen": ":50051"}, "must be HOST:PORT"),
        ({"listen": "127.0.0.1"}, "must be HOST:PORT"),
        ({"listen": "127.0.0.1:70000"}, "must be HOST:PORT"),
        ({"listen": "::1:50051"}, "must be HOST:PORT"),
        ({"listen": "http://127.0.0.1:1"}, "must be HOST:PORT"),
        ({"socket": ""}, "at least one of both is required"),
        ({"socket": "/" + "x" * 107}, "at most 107 bytes"),
        ({"socket_group": "docker", "socket_mode": "0600"}, "socket_group: requires socket_mode 0660"),
        ({"tls_cert": "/a"}, "tls_cert, tls_key: must be set together"),
        ({"tls_client_ca": "/a"}, "tls_client_ca: requires tls_cert"),
        ({"port_range": "80-90"}, "port_range: must start at 1024"),
        ({"docker_host": "/var/run/docker.sock"}, "must be unix:///PATH or tcp://HOST:PORT"),
        ({"docker_host": "ssh://host"}, "must be unix:///PATH or tcp://HOST:PORT"),
        ({"docker_host": "tcp://host"}, "must be HOST:PORT"),
        ({"docker_host": "tcp://10.0.0.1:2375"}, "is not loopback; docker_tls_dir is required"),
        ({"docker_tls_dir": "/tls"}, "docker_tls_dir: requires docker_host tcp"),
        ({"etcd_endpoints": "10.0.0.1:2379"}, "10.0.0.1:2379 is not loopback; TLS is required: set etcd_ca"),
        ({"etcd_endpoints": "127.0.0.1:2379,etcd2.example:2379"}, "etcd2.example:2379 is not loopback"),
        (
            {"etcd_endpoints": "[fd00::1]:1", "etcd_user": "a", "etcd_password_file": "/p"},
            "the password of etcd_user would be sent in plain text",
        ),
        ({"etcd_cert": "/a", "etcd_endpoints": "a:1"}, "etcd_cert, etcd_key: must be set together"),
        ({"etcd_user": "a", "etcd_endpoints": "a:1"}, "etcd_user, etcd_password_file: must be set together"),
        ({"etcd_ca": "/a"}, "etcd_endpoints: is empty"),
        ({"etcd_endpoints": "https://a:1"}, "without a scheme"),
        ({"etcd_endpoints": "unix:/a/c.sock:0,b:1"}, "a single unix:"),
        ({"etcd_endpoints": "unix:c.sock:0"}, "must be HOST:PORT,… or a single unix:"),
        ({"etcd_prefix": "gpudock"}, "match pattern"),
        ({"node_name": "GPU_1"}, "must match ^[a-z]"),
        ({"node_name": ""}, "must match ^[a-z]"),
        ({"host_id": "a/b"}, "match pattern"),
        ({"host_id": "a\n"}, "match pattern"),
        ({"advertise_address": "gpu1"}, "must be HOST:PORT"),
        ({"max_execs": 0}, "greater than or equal to 1"),
        ({"adoptable_volumes": "a/b"}, "must be names of engine volumes"),
        ({"commit_replace": "all"}, "'own' or 'any'"),
        ({"commit_repositories": "a:tag"}, "repositories without a tag"),
        ({"commit_repositories": "tenants/{name}"}, "repositories without a tag"),
        ({"layer_carry": "magic"}, "'auto', 'exchange', 'copy' or 'commit'"),
        ({"default_pids_limit": 100, "max_pids_limit": 99}, "the default is 100; it must be at most the maximum, 99"),
        ({"default_pids_limit": 0}, "the default is unlimited"),
        ({"max_pids_limit": -1}, "greater than or equal to 0"),
        ({"max_memory": "6M5"}, "must be a number of bytes"),
        ({"max_memory": -1}, "must be a number of bytes"),
        ({"max_memory": "5M"}, "it must be at least 6291456"),
        ({"drop_net_raw": "yes"}, "must be true or false"),
        ({"no_new_privileges": 1}, "must be true or false"),
        ({"allowed_nvidia_switches": "NVIDIA_VISIBLE_DEVICES"}, "'NVIDIA_GDS'"),
        ({"prot_range": "1-2"}, "Extra inputs"),
    ],
)
def test_invalid_settings_are_refused_with_a_reason(values: dict[str, Any], message: str) -> None:
    assert message in problems(**values)


def test_all_conflicts_of_settings_are_reported_together() -> None:
    found = problems(listen="0.0.0.0:25000", socket="", port_range="80-29999", etcd_user="a")
    assert len(found.splitlines()) == 6


@pytest.mark.parametrize(
    "values",
    [
        {"listen": "127.0.0.1:50051,[::1]:50051,localhost:50051,127.1.2.3:0", **TOKENS},
        {"listen": "0.0.0.0:50051", **TLS, **TOKENS},
        {"listen": "[::]:50051", **TLS, "tls_client_ca": "/tls/ca.pem"},
        {"socket": "", "listen": "127.0.0.1:50051", **TOKENS},
        {"docker_host": "tcp://127.0.0.1:2375"},
        {"docker_host": "tcp://[fd00::1]:2376", "docker_tls_dir": "/tls"},
        {"etcd_endpoints": "unix:/run/etcd/c.sock:0"},
        {"pinned_port_ranges": "443-443,8080-8090"},
        {"etcd_endpoints": "127.0.0.1:2379,[::1]:2379,localhost:2379", "etcd_user": "a", "etcd_password_file": "/p"},
        {"etcd_endpoints": "10.0.0.1:2379", "etcd_cert": "/cert", "etcd_key": "/key"},
        {"etcd_endpoints": "10.0.0.1:2379", "etcd_ca": "/ca", "etcd_user": "a", "etcd_password_file": "/p"},
        {"layer_carry": LayerTransferChoice.COPY, "socket_mode": 0o600},
        {"allowed_nvidia_switches": "NVIDIA_GDS,NVIDIA_MOFED"},
        {"adoptable_volumes": "models,team-*"},
        {"commit_repositories": "team,tenants/{owner},reg.example.com:5000/{owner}-models"},
        {"default_pids_limit": 0, "max_pids_limit": 0, "drop_net_raw": "false", "no_new_privileges": True},
    ],
)
def test_valid_settings_are_accepted(values: dict[str, Any]) -> None:
    make(**values)


@given(st.text(max_size=80))
def test_any_hostname_makes_a_valid_node_name(hostname: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: hostname)
        assert is_name(default_node_name())


def test_the_host_id_is_derived_from_the_machine_id_and_does_not_reveal_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_id = tmp_path / "machine-id"
    machine_id.write_text("8e2f0a2d3c4b4f6a9d1e7c5b3a190f8e\n")
    host_id = default_host_id(machine_id)
    assert host_id == default_host_id(machine_id)
    assert host_id != machine_id.read_text().strip()
    assert uuid.UUID(host_id).version == 4
    monkeypatch.setattr("socket.gethostname", lambda: "gpu1")
    for text in ("uninitialized\n", "", "zz"):
        machine_id.write_text(text)
        assert default_host_id(machine_id) == "gpu1"
    assert default_host_id(tmp_path / "missing") == "gpu1"


@pytest.mark.parametrize(
    ("address", "expected"),
    [("a:1", ("a", 1)), ("[::1]:65535", ("::1", 65535)), ("127.0.0.1:0", ("127.0.0.1", 0))],
)
def test_addresses_are_split(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


def test_only_addresses_that_no_other_host_can_reach_are_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "", "128.0.0.1")))  # noqa: S104 - not bound
