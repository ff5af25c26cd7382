"""What a daemon refuses to start with, each with a message that says how to correct it."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest
from gpudock.v1 import container_pb2
from gpudock_server.adapters.etcd import EtcdAddress, EtcdConnection, messages
from gpudock_server.adapters.etcd.keys import SCHEMA, Keys
from gpudock_server.adapters.etcd.values import encode_number

from tests.calls import Caller
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, ports_in_use
from tests.rig import Rig

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
OTHER_USER = 65534


async def test_a_daemon_without_an_engine_does_not_start(daemons: IsolatedDaemons) -> None:
    message = await daemons.startup_error(docker_host="unix:///nowhere/docker.sock")
    assert "cannot use the Docker Engine at unix:///nowhere/docker.sock" in message
    assert "docker_host" in message


async def test_a_daemon_that_may_not_open_the_socket_of_the_engine_does_not_start(
    daemons: IsolatedDaemons, tmp_path: Path
) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        os.chown(path, OTHER_USER, OTHER_USER)
        message = await daemons.startup_error(module="tests.engine.without_dac_override", docker_host=f"unix://{path}")
    assert f"cannot use the Docker Engine at unix://{path}" in message
    assert "ermission denied" in message
    assert "docker" in message.splitlines()[-1]


async def test_a_daemon_without_an_etcd_does_not_start(daemons: IsolatedDaemons) -> None:
    message = await daemons.startup_error("--store-timeout", "1", etcd_endpoints="127.0.0.1:1")
    assert "etcd at 127.0.0.1:1 does not answer" in message
    assert "etcd_endpoints" in message.splitlines()[-1]


async def test_state_of_a_newer_schema_is_refused(daemons: IsolatedDaemons, rig: Rig) -> None:
    connection = EtcdConnection(EtcdAddress((rig.etcd.endpoint,)))
    await connection.open()
    key = Keys(daemons.prefix).schema()
    await connection.txn(success=[messages.put(key, encode_number(SCHEMA + 1))])
    await connection.close()
    message = await daemons.startup_error()
    assert f"has schema {SCHEMA + 1}; this gpudockd supports up to {SCHEMA}" in message
    assert "install the gpudock version that wrote it" in message


async def test_one_message_names_all_invalid_settings(daemons: IsolatedDaemons) -> None:
    message = await daemons.startup_error("--port-range", "9-4", "--max-execs", "0", "--node-name", "No Name", code=2)
    for setting in ("port_range", "max_execs", "node_name"):
        assert setting in message.replace("-", "_")


async def test_a_state_folder_that_cannot_be_created_is_refused(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = await daemons.startup_error("--state-dir", str(tmp_path / "file" / "state"))
    assert "cannot create state_dir" in message
    assert "--state-dir" in message


async def test_a_state_folder_of_another_user_is_refused(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    os.chown(state, OTHER_USER, OTHER_USER)
    message = await daemons.startup_error(state_dir=state)
    assert f"state_dir {state} is owned by uid {OTHER_USER}" in message
    assert f"chown root {state}" in message


async def test_a_state_folder_that_others_can_enter_is_closed(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o775)
    daemon = await daemons.start(state_dir=state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert "state_dir mode changed" in daemon.log_text
    assert "0775" in daemon.log_text


async def test_secrets_that_other_users_can_read_are_refused(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("alice:0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o644)
    by_token, by_password, by_key = await asyncio.gather(
        daemons.startup_error("--listen", "127.0.0.1:0", "--token-file", str(secret)),
        daemons.startup_error("--etcd-user", "a", "--etcd-password-file", str(secret), etcd_endpoints="127.0.0.1:1"),
        daemons.startup_error("--etcd-cert", str(secret), "--etcd-key", str(secret), etcd_endpoints="127.0.0.1:1"),
    )
    for message, setting in ((by_token, "token_file"), (by_password, "etcd_password_file"), (by_key, "etcd_key")):
        assert message.splitlines() == [
            f"{setting} {secret} is accessible to every user of this host (mode 0644)",
            f"chown root {secret} && chmod 600 {secret}",
        ]


async def test_an_etcd_version_that_can_lose_consistency_is_refused(daemons: IsolatedDaemons) -> None:
    message = await daemons.startup_error(
        "--etcd-endpoints", "", "--allow-inconsistent-etcd", "false", etcd_endpoints=""
    )
    assert "is etcd 3.5.1; etcd 3.5.0 to 3.5.2 can lose consistency" in message
    assert "allow_inconsistent_etcd" in message.splitlines()[-1]


async def test_a_port_range_without_a_free_port_is_refused(daemons: IsolatedDaemons, rig: Rig) -> None:
    with ports_in_use(rig, 28101, 28102):
        message = await daemons.startup_error("--port-range", "28101-28102")
        assert "no free TCP port in port_range 28101-28102" in message
        assert "--port-range" in message
        # One free port is enough, and so is a port of a container of this daemon.
        daemon = await daemons.start("--port-range", "28101-28103")
        async with Caller(daemon.target) as caller:
            created = await caller.create("last", ports=[container_pb2.PortRequest(container_port=80)])
            assert created.status.ports[0].host_port == 28103
        await asyncio.to_thread(daemon.kill9)
        await daemons.start("--port-range", "28101-28103", after=daemon)


@pytest.mark.deep
async def test_a_node_name_or_socket_of_another_daemon_is_refused(daemons: IsolatedDaemons) -> None:
    first = await daemons.start()
    same_node, same_socket = await asyncio.gather(
        daemons.startup_error(), daemons.startup_error("--node-name", "another", socket=first.socket)
    )
    assert f"node '{daemons.node}' is in use by gpudockd" in same_node
    assert f"pid {first.pid}" in same_node
    assert "another node name" in same_node
    assert f"another gpudockd (pid {first.pid}) listens on {first.socket}" in same_socket
    assert "--socket" in same_socket
    async with Caller(first.target) as caller:
        assert (await caller.create("created-after-refusals")).status.state == RUNNING
