"""Responses of Docker: containers, events and failures."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
from aiodocker import DockerError
from gpudock_server.adapters.docker import translate
from gpudock_server.adapters.docker.events import engine_event
from gpudock_server.adapters.docker.failures import engine_errors, start_failure
from gpudock_server.errors import EngineRejected, EngineUnavailable, PortInUse, StartFailed
from gpudock_server.model.engine import (
    EngineEventKind,
    EngineState,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.docker_examples import INSPECTED

MIB = 1 << 20


def test_an_inspected_container_has_every_field() -> None:
    container = translate.container(INSPECTED)
    assert (container.id, container.name, container.image_id) == ("c0ffee", "web-1", "sha256:1")
    assert (container.state, container.exit_code, container.oom_killed) == (EngineState.EXITED, 137, True)
    assert container.gpu_uuids == ("GPU-1",)
    assert (container.spec, container.ports) == (None, ())
    assert container.upper_dir == "/var/lib/docker/overlay2/x/diff"
    assert container.volumes == {"/data": "v1"}
    assert (container.cpus, container.memory_bytes, container.restart_count, container.health) == (
        0.25,
        MIB,
        2,
        "unhealthy",
    )
    assert container.start_time == datetime(2026, 1, 2, 3, 4, 5, 123456, UTC)
    assert container.finish_time == datetime(2026, 1, 2, 3, 4, 5, 0, UTC)


@pytest.mark.parametrize(
    "driver", [None, {}, {"Name": "overlayfs"}, {"Name": "btrfs", "Data": {"UpperDir": "/no"}}, {"Name": "overlay2"}]
)
def test_a_container_without_an_overlay2_upper_dir_has_none(driver: object) -> None:
    assert translate.container(INSPECTED | {"GraphDriver": driver}).upper_dir == ""


def test_a_container_without_optional_fields_is_read() -> None:
    container = translate.container(
        {"Id": "1", "Name": "/n", "Image": "i", "State": {"Status": "unknown", "Running": True}}
    )
    assert container.state is EngineState.RUNNING
    assert container.gpu_uuids == ()
    assert container.start_time is None


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "0001-01-01T00:00:00+05:00", "", None])
def test_zero_time_is_none(text: str | None) -> None:
    assert translate.parse_time(text) is None


@given(st.datetimes(min_value=datetime(1970, 1, 1), timezones=st.timezones()), st.integers(0, 999))  # noqa: DTZ001 - hypothesis requires naive bounds
def test_any_time_with_nanoseconds_is_parsed(moment: datetime, nanos: int) -> None:
    offset = moment.utcoffset() or timedelta(0)
    if offset % timedelta(minutes=1):
        return
    text = moment.isoformat(timespec="microseconds")
    with_nanos = f"{text[:26]}{nanos:03}{text[26:]}"
    assert translate.parse_time(with_nanos) == moment.astimezone(UTC)


def test_an_event_keeps_the_labels_of_gpudock_only() -> None:
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
def test_other_events_are_ignored(document: dict[str, Any]) -> None:
    assert engine_event(document) is None


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
def test_each_failure_becomes_one_error(error: Exception, kind: type[Exception]) -> None:
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
def test_a_start_that_fails_for_a_used_port(message: str, port: int, protocol: str) -> None:
    failure = start_failure(EngineRejected(call="start", status=500, detail=message), BINDINGS)
    assert isinstance(failure, PortInUse)
    assert (failure.host_port, failure.protocol) == (port, protocol)


@pytest.mark.parametrize(
    ("container", "name"),
    [({"Config": {"Labels": {"gpudock.name": "web"}}}, "web"), ({"Name": "/web-1"}, "web-1"), ({"Id": "c1"}, "c1")],
)
def test_a_start_that_fails_for_another_reason(container: dict[str, Any], name: str) -> None:
    failure = start_failure(EngineRejected(call="start", status=400, detail="no such file"), container)
    assert isinstance(failure, StartFailed)
    assert (failure.container, failure.detail) == (name, "no such file")
