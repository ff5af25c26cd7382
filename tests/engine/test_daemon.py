"""The daemon as a process: what it refuses to start with, how it stops, and what it survives."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2
from gpudock.v1.container_service_pb2 import PauseContainerRequest
from gpudock_server.adapters.etcd import EtcdAddress, EtcdConnection, messages
from gpudock_server.adapters.etcd.keys import SCHEMA, Keys
from gpudock_server.adapters.etcd.values import encode_number
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.calls import Caller, failure, failure_of, scale_request
from tests.engine.grpcurl import GRPCURL
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, ports_in_use, stream_failure, until, until_state
from tests.rig import Daemon, EngineProxy, Rig, freeze, http_unix
from tests.rig.patience import limit
from tests.rpc.certificates import Authority

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED
SERVICES = ("", "gpudock.v1.ContainerService", "gpudock.v1.NodeService", "gpudock.v1.OperationService")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

NOBODY = 65534

# Never ends when asked to.
STUBBORN = ("sh", "-c", "trap '' TERM; while :; do sleep 0.2; done")


# -- refusals at start -----------------------------------------------------------------------------------------------


async def test_an_engine_out_of_reach(daemons: IsolatedDaemons) -> None:
    said = await daemons.startup_error(docker_host="unix:///nowhere/docker.sock")
    assert "cannot use the Docker Engine at unix:///nowhere/docker.sock" in said
    assert "docker_host" in said


async def test_a_socket_of_the_engine_that_it_may_not_open(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        path.chmod(0o600)
        os.chown(path, NOBODY, NOBODY)
        said = await daemons.startup_error(module="tests.engine.without_dac_override", docker_host=f"unix://{path}")
    assert f"cannot use the Docker Engine at unix://{path}" in said
    assert "ermission denied" in said
    assert "docker" in said.splitlines()[-1]


async def test_an_etcd_out_of_reach(daemons: IsolatedDaemons) -> None:
    said = await daemons.startup_error("--store-timeout", "1", etcd_endpoints="127.0.0.1:1")
    assert "etcd at 127.0.0.1:1 does not answer" in said
    assert "etcd_endpoints" in said.splitlines()[-1]


async def test_state_of_a_newer_schema(daemons: IsolatedDaemons, rig: Rig) -> None:
    connection = EtcdConnection(EtcdAddress((rig.etcd.endpoint,)))
    await connection.open()
    key = Keys(daemons.prefix).schema()
    await connection.txn(success=[messages.put(key, encode_number(SCHEMA + 1))])
    await connection.close()
    said = await daemons.startup_error()
    assert f"has schema {SCHEMA + 1}; this gpudockd supports up to {SCHEMA}" in said
    assert "install the gpudock version that wrote it" in said


async def test_bad_settings_are_all_named_at_once(daemons: IsolatedDaemons) -> None:
    said = await daemons.startup_error("--port-range", "9-4", "--max-execs", "0", "--node-name", "No Name", code=2)
    for setting in ("port_range", "max_execs", "node_name"):
        assert setting in said.replace("-", "_")


async def test_a_state_folder_that_cannot_be(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = await daemons.startup_error("--state-dir", str(tmp_path / "file" / "state"))
    assert "cannot create state_dir" in said
    assert "--state-dir" in said


async def test_a_state_folder_of_another_user(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    os.chown(state, NOBODY, NOBODY)
    said = await daemons.startup_error(state_dir=state)
    assert f"state_dir {state} is owned by uid {NOBODY}" in said
    assert f"chown root {state}" in said


async def test_a_state_folder_that_others_can_enter_is_closed(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o775)
    daemon = await daemons.start(state_dir=state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert "state_dir mode changed" in daemon.log_text
    assert "0775" in daemon.log_text


async def test_secrets_that_others_can_read(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("alice:0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o644)
    by_token, by_password, by_key = await asyncio.gather(
        daemons.startup_error("--listen", "127.0.0.1:0", "--token-file", str(secret)),
        daemons.startup_error("--etcd-user", "a", "--etcd-password-file", str(secret), etcd_endpoints="127.0.0.1:1"),
        daemons.startup_error("--etcd-cert", str(secret), "--etcd-key", str(secret), etcd_endpoints="127.0.0.1:1"),
    )
    for said, setting in ((by_token, "token_file"), (by_password, "etcd_password_file"), (by_key, "etcd_key")):
        assert said.splitlines() == [
            f"{setting} {secret} is accessible to every user of this host (mode 0644)",
            f"chown root {secret} && chmod 600 {secret}",
        ]


async def test_an_etcd_that_can_lose_its_consistency(daemons: IsolatedDaemons) -> None:
    said = await daemons.startup_error("--etcd-endpoints", "", "--allow-inconsistent-etcd", "false", etcd_endpoints="")
    assert "is etcd 3.5.1; etcd 3.5.0 to 3.5.2 can lose consistency" in said
    assert "allow_inconsistent_etcd" in said.splitlines()[-1]


async def test_a_port_range_that_others_have(daemons: IsolatedDaemons, rig: Rig) -> None:
    with ports_in_use(rig, 28101, 28102):
        said = await daemons.startup_error("--port-range", "28101-28102")
        assert "no free TCP port in port_range 28101-28102" in said
        assert "--port-range" in said
        # One that can be had is enough, and so is one that a container of ours has.
        daemon = await daemons.start("--port-range", "28101-28103")
        async with Caller(daemon.target) as caller:
            created = await caller.create("last", ports=[container_pb2.PortRequest(container_port=80)])
            assert created.status.ports[0].host_port == 28103
        await asyncio.to_thread(daemon.kill9)
        await daemons.start("--port-range", "28101-28103", after=daemon)


@pytest.mark.deep
async def test_a_node_and_a_socket_that_another_daemon_has(daemons: IsolatedDaemons) -> None:
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
        assert (await caller.create("unhurt")).status.state == RUNNING


# -- the end ---------------------------------------------------------------------------------------------------------


async def at_stage(stream: AsyncIterator[object], stage: str) -> operation_pb2.Operation:
    """Read an operation's stream until it is in a stage."""
    async for answer in stream:
        operation: operation_pb2.Operation = answer.operation  # type: ignore[attr-defined]  # each answer has it
        if operation.stage == stage:
            return operation
    raise AssertionError(f"it never came to {stage}")


async def scaling(caller: Caller, stop_seconds: float) -> tuple[AsyncIterator[object], str]:
    """A scale from 1 to 2 cards that is now waiting for the old process to end, and its operation."""
    stop_timeout = duration_pb2.Duration()
    stop_timeout.FromMilliseconds(int(stop_seconds * 1000))
    await caller.create("slow", 1, command=STUBBORN, stop_timeout=stop_timeout)
    await caller.shell("slow", "echo kept > /file")
    stream = aiter(caller.containers.ScaleContainer(scale_request("slow", 2)))
    return stream, (await at_stage(stream, "stop")).id


async def finished_by(daemon: Daemon, operation_id: str) -> None:
    """The next daemon brings the scale to its end, and whoever asks is told so."""
    async with Caller(daemon.target) as caller:
        watch = operation_service_pb2.WatchOperationRequest(id=operation_id)
        last = [answer async for answer in caller.operations.WatchOperation(watch)][-1]
        assert len(last.result.container.status.gpu_uuids) == 2
        assert (await caller.get("slow")).status.state == RUNNING
        assert await caller.shell("slow", "cat /file") == "kept\n"
        assert sorted((await caller.holders()).values()) == ["", "", "", "", "", "", "slow", "slow"]


async def test_sigterm_lets_work_reach_a_recorded_step(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--shutdown-grace", "20")
    async with Caller(daemon.target) as caller:
        stream, operation_id = await scaling(caller, 3)
        await caller.create("other")
        command = asyncio.create_task(caller.run("other", "sleep", "60"))
        watcher = aiter(caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id)))
        await anext(watcher)
        daemon.terminate()
        await until(partial(_drains, daemon))
        refused = await failure(caller.create("late"))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        for watched in (stream_failure(stream), stream_failure(watcher), failure(command)):
            end = await watched
            assert end is not None
            assert (end.code, end.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert await asyncio.to_thread(daemon.wait, 10) == 0, daemon.log_text
    assert "Traceback" not in daemon.log_text
    await finished_by(await daemons.start(after=daemon), operation_id)


async def _drains(daemon: Daemon) -> bool:
    return "draining" in daemon.log_text


@pytest.mark.deep
async def test_what_takes_longer_than_the_grace_is_left_where_it_is(daemons: IsolatedDaemons) -> None:
    # A quarter of it is left to tell the callers, which on a busy machine takes a while.
    daemon = await daemons.start("--shutdown-grace", "3", "--exec-hangup-grace", "600")
    async with Caller(daemon.target) as caller:
        stream, operation_id = await scaling(caller, 4)
        await caller.create("other")
        command = asyncio.create_task(caller.run("other", "sh", "-c", "trap '' HUP; sleep 600"))
        daemon.terminate()
        end = await stream_failure(stream)
        assert end is not None
        assert (end.code, end.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert (await failure(command)).code is grpc.StatusCode.UNAVAILABLE
    # The command is not waited for, and nor is the operation, which goes on below.
    assert await asyncio.to_thread(daemon.wait, 10) == 0, daemon.log_text
    assert "Traceback" not in daemon.log_text, daemon.log_text
    await finished_by(await daemons.start(after=daemon), operation_id)


@pytest.mark.deep
async def test_a_second_sigterm_is_at_once(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--shutdown-grace", "60")
    async with Caller(daemon.target) as caller:
        _, operation_id = await scaling(caller, 8)
        daemon.terminate()
        await until(partial(_drains, daemon))
        daemon.terminate()
        # Had it waited for the operation, it would have ended in order, with 0.
        assert await asyncio.to_thread(daemon.wait, 10) == 1
        assert "exiting immediately" in daemon.log_text
    await finished_by(await daemons.start(after=daemon), operation_id)


async def test_sigusr1_shows_where_everything_stands(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> None:
    daemon = await daemons.start(docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        await caller.create("one")
        hang = engine_proxy.faults.hang("POST", "/containers/[^/]+/pause")
        pausing = asyncio.ensure_future(caller.containers.PauseContainer(PauseContainerRequest(name="one")))
        await asyncio.wait_for(hang.hit.wait(), limit(10))
        daemon.signal(signal.SIGUSR1)

        async def shown() -> bool:
            return "task dump complete" in daemon.log_text

        await until(shown)
        # Who waits for the engine, all the way in; and the threads, which the loop need not be alive for.
        waits = [line for line in daemon.log_text.splitlines() if "task stack" in line]
        assert any(
            re.search(r"core/.* in .*adapters/docker/containers.py:\d+ in ContainerCalls.pause", line) for line in waits
        )
        assert "most recent call first" in daemon.log_text
        engine_proxy.faults.clear()
        await pausing
        assert (await caller.get("one")).status.state == container_pb2.CONTAINER_STATE_PAUSED


async def test_told_to_stop_while_it_starts(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> None:
    hang = engine_proxy.faults.hang("GET", "/info")
    daemon = await daemons.start(docker_host=engine_proxy.url, serving=False)
    async with asyncio.timeout(limit(20)):
        await hang.hit.wait()
    daemon.terminate()
    assert await asyncio.to_thread(daemon.wait, 5) == 0, daemon.log_text
    assert "Traceback" not in daemon.log_text


# -- kill -9 ---------------------------------------------------------------------------------------------------------


async def _node_created_at(daemons: IsolatedDaemons) -> int:
    """The revision of etcd at which the node's key was created."""
    key = base64.b64encode(Keys(daemons.prefix).node(daemons.node)).decode()
    etcd = daemons.rig.etcd
    answer = await asyncio.to_thread(http_unix.call, etcd.socket, "POST", "/v3/kv/range", send={"key": key})
    return int(answer["kvs"][0]["create_revision"])


async def test_after_kill_9_the_next_one_need_not_wait_for_the_lease(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        before = await caller.create("stays", 3)
    node = await _node_created_at(daemons)
    await asyncio.to_thread(daemon.kill9)
    daemon = await daemons.start(after=daemon)
    # Replaced: the key would have been created again, had the next daemon waited until the lease of the first expired.
    assert await _node_created_at(daemons) == node
    async with Caller(daemon.target) as caller:
        assert await caller.get("stays") == before
        assert await caller.free_gpus() == 5


# -- an etcd of its own ----------------------------------------------------------------------------------------------


def etcd_of(daemon: Daemon) -> int:
    """The pid of the etcd that a daemon runs; 0 if there is none."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "exe").readlink().name == "etcd":
                cwd = (process / "cwd").readlink()
                if cwd == daemon.state_dir / "etcd":
                    return int(process.name)
        except OSError:
            continue
    return 0


async def test_an_etcd_of_its_own(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--shutdown-grace", "5", etcd_endpoints="")
    folder = daemon.state_dir / "etcd"
    async with Caller(daemon.target) as caller:
        created = await caller.create("kept", 2)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    _unreachable_for_others(folder / "c.sock:0")

    first = etcd_of(daemon)
    os.kill(first, signal.SIGKILL)
    async with Caller(daemon.target) as caller:
        assert await caller.get("kept") == created, "a call waits for the next etcd"
        assert (await caller.scale("kept", 1)).spec.gpus.count == 1
    assert etcd_of(daemon) not in (0, first)
    assert daemon.running

    await asyncio.to_thread(daemon.kill9)

    async def gone() -> bool:
        return etcd_of(daemon) == 0

    await until(gone, 5)
    daemon = await daemons.start("--shutdown-grace", "5", after=daemon, etcd_endpoints="")
    async with Caller(daemon.target) as caller:
        assert len((await caller.get("kept")).status.gpu_uuids) == 1
    assert await asyncio.to_thread(daemon.stop) == 0, daemon.log_text
    assert etcd_of(daemon) == 0
    assert "Traceback" not in daemon.log_text
    daemon = await daemons.start(after=daemon, etcd_endpoints="")
    async with Caller(daemon.target) as caller:
        assert (await caller.get("kept")).spec.gpus.count == 1
        await caller.delete("kept")


def _unreachable_for_others(path: Path) -> None:
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/python3", "-c"]
    tried = subprocess.run([*as_nobody, connect], check=False, capture_output=True, text=True)
    assert "PermissionError" in tried.stderr, tried
    assert subprocess.run(["/usr/bin/python3", "-c", connect], check=False).returncode == 0, "it is there"


# -- health ----------------------------------------------------------------------------------------------------------


class Health:
    """What a daemon's health service says of each service."""

    def __init__(self, caller: Caller) -> None:
        self._stub = health_pb2_grpc.HealthStub(caller.channel)

    async def serving(self) -> bool:
        """Whether all are SERVING."""
        return await self._all_are(SERVING)

    async def not_serving(self) -> bool:
        """Whether none is."""
        return await self._all_are(NOT_SERVING)

    async def _all_are(self, status: int) -> bool:
        answers = [await self._stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in SERVICES]
        return all(answer.status == status for answer in answers)


async def test_health_follows_etcd(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--store-timeout", "1", etcd_endpoints="")
    etcd = etcd_of(daemon)
    async with Caller(daemon.target) as caller:
        health = Health(caller)
        await until(health.serving)
        freeze(etcd)
        await until(health.not_serving)
        assert (await failure(caller.create("none"))).reason == "STORE_UNAVAILABLE"
        os.kill(etcd, signal.SIGCONT)
        await until(health.serving)
        assert (await caller.create("some")).status.state == RUNNING
    assert daemon.log_text.count("not serving") < 10, "it says so when it changes"


@pytest.mark.deep
async def test_health_follows_the_engine(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> None:
    daemon = await daemons.start(docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        health = Health(caller)
        await until(health.serving)
        engine_proxy.faults.hang(".*", ".*", times=None)
        await until(health.not_serving)
        engine_proxy.faults.clear()
        await until(health.serving)
        engine_proxy.faults.drop(".*", ".*", times=None)
        await until(health.not_serving)
        engine_proxy.faults.clear()
        await until(health.serving)
        assert (await caller.create("some")).status.state == RUNNING
    assert daemon.log_text.count("not serving") < 10, "it says so when it changes"


# -- TCP -------------------------------------------------------------------------------------------------------------


def grpcurl(rig: Rig, *words: str) -> str:
    """What grpcurl says, run where the daemon's TCP addresses are."""
    done = rig.run(str(GRPCURL), *words, check=False)
    return done.stdout + done.stderr


PROTO = ("-import-path", "protos", "-proto", "gpudock/v1/node_service.proto")
GET_NODE = "gpudock.v1.NodeService/GetNode"


async def test_a_token_on_loopback(daemons: IsolatedDaemons, rig: Rig, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alice:0123456789abcdef0123456789abcdef\n")
    tokens.chmod(0o600)
    daemon = await daemons.start("--listen", "127.0.0.1:38051", "--token-file", str(tokens))

    assert "Unauthenticated" in await asyncio.to_thread(grpcurl, rig, "-plaintext", *PROTO, "127.0.0.1:38051", GET_NODE)
    wrong = ("-H", "authorization: Bearer 00000000000000000000000000000000")
    right = ("-H", "authorization: Bearer 0123456789abcdef0123456789abcdef")
    address = "127.0.0.1:38051"
    assert "Unauthenticated" in await asyncio.to_thread(grpcurl, rig, "-plaintext", *PROTO, *wrong, address, GET_NODE)
    assert daemons.node in await asyncio.to_thread(grpcurl, rig, "-plaintext", *right, address, GET_NODE)
    assert "SERVING" in await asyncio.to_thread(
        grpcurl, rig, "-plaintext", *right, address, "grpc.health.v1.Health/Check"
    )
    assert daemon.running


async def test_the_audit_says_who_called(daemons: IsolatedDaemons, rig: Rig, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    secrets = {"alice": "0123456789abcdef0123456789abcdef", "bob": "fedcba9876543210fedcba9876543210"}
    tokens.write_text("".join(f"{name}:{token}\n" for name, token in secrets.items()))
    tokens.chmod(0o600)
    flags = ("--listen", "127.0.0.1:38053", "--token-file", str(tokens))
    daemon = await daemons.start(*flags, "--log-format", "json")
    proto = ("-import-path", "protos", "-proto", "gpudock/v1/container_service.proto")
    for token in (*secrets.values(), "nobody's"):
        for name in ("none", "x" * 100_000):
            words = ("-H", f"authorization: Bearer {token}", "-d", json.dumps({"name": name}), "127.0.0.1:38053")
            await asyncio.to_thread(
                grpcurl, rig, "-plaintext", *proto, *words, "gpudock.v1.ContainerService/PauseContainer"
            )
    async with Caller(daemon.target) as caller:
        await failure(caller.containers.PauseContainer(PauseContainerRequest(name="none")))
    logged = [json.loads(line) for line in daemon.log_text.splitlines() if line.startswith("{")]
    audit = [line for line in logged if line["logger"] == "gpudock.audit"]
    assert [(line["caller_kind"], line["caller"], line["outcome"]) for line in audit] == [
        ("token", "alice", "NOT_FOUND"),
        ("token", "alice", "INVALID_ARGUMENT"),
        ("token", "bob", "NOT_FOUND"),
        ("token", "bob", "INVALID_ARGUMENT"),
        ("nobody", "", "UNAUTHENTICATED"),
        ("nobody", "", "UNAUTHENTICATED"),
        ("unix", "", "NOT_FOUND"),
    ]
    assert {line["method"] for line in audit} == {"PauseContainer"}
    assert max(map(len, daemon.log_text.splitlines())) < 2000
    assert not [token for token in secrets.values() if token in daemon.log_text]


async def test_tls_with_certificates_of_clients(daemons: IsolatedDaemons, rig: Rig, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, client = authority.sign("gpu1", "IP:127.0.0.1"), authority.sign("bob")
    stranger = Authority(tmp_path, "stranger").sign("mallory")
    address = "127.0.0.1:38052"
    await daemons.start(
        *("--listen", address, "--tls-cert", str(server.certificate), "--tls-key", str(server.key)),
        *("--tls-client-ca", str(authority.own.certificate)),
    )

    async def call(*words: str) -> str:
        return await asyncio.to_thread(
            grpcurl, rig, "-max-time", "5", "-connect-timeout", "2", *PROTO, *words, address, GET_NODE
        )

    ca = ("-cacert", str(authority.own.certificate))
    assert daemons.node in await call(*ca, "-cert", str(client.certificate), "-key", str(client.key))
    for refused in ((), ca, ("-plaintext",), (*ca, "-cert", str(stranger.certificate), "-key", str(stranger.key))):
        assert daemons.node not in await call(*refused)


# -- two daemons on one host -----------------------------------------------------------------------------------------


@pytest.mark.deep
async def test_two_daemons_on_one_host_and_one_etcd_give_nothing_away_twice(daemons: IsolatedDaemons, rig: Rig) -> None:
    nodes = [f"{daemons.node}-{number}" for number in (1, 2)]
    started = await asyncio.gather(*(daemons.start(node=node) for node in nodes))
    callers = [Caller(daemon.target) for daemon in started]
    port = container_pb2.PortRequest(container_port=80)

    async def create(number: int) -> str:
        try:
            await callers[number % 2].create(f"one-{number}", 1, ports=[port])
        except grpc.aio.AioRpcError as error:
            refused = failure_of(error)
            assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "GPU_EXHAUSTED")
            assert refused.metadata["free"] == "0"
            return ""
        return f"one-{number}"

    made = [name for name in await asyncio.gather(*(create(number) for number in range(100))) if name]
    assert len(made) == 8
    containers = [await callers[0].get(name) for name in made]
    assert len({uuid for one in containers for uuid in one.status.gpu_uuids}) == 8
    assert len({one.status.ports[0].host_port for one in containers}) == 8
    assert {one.node for one in containers} <= set(nodes)
    for caller in callers:
        assert sorted((await caller.holders()).values()) == sorted(made)
        for one in containers:
            mine = one.node == nodes[callers.index(caller)]
            if not mine:
                wrong = await failure(caller.delete(one.name))
                assert (wrong.code, wrong.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_NODE")
                assert wrong.metadata["node"] == one.node
                assert (await failure(caller.run(one.name, "true"))).reason == "WRONG_NODE"
    for one in containers:
        await callers[nodes.index(one.node)].delete(one.name)
    for caller in callers:
        assert await caller.free_gpus() == 8
        await caller.channel.close(None)
    assert rig.engine.call("GET", "/containers/json?all=1") == []


# -- an engine that is restarted -------------------------------------------------------------------------------------


async def test_an_engine_that_is_restarted_under_it(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--engine-timeout", "5")
    async with Caller(daemon.target) as caller:
        await caller.create("plain", 2)
        with rig.engine.down(killed=True):
            assert (await failure(caller.create("none"))).reason == "ENGINE_UNAVAILABLE"
        await until_state(caller, "plain", EXITED, 30)
        assert sum(holder == "plain" for holder in (await caller.holders()).values()) == 2, "it can be started again"
        assert len((await caller.start("plain")).status.gpu_uuids) == 2
        # The stream of events is there again: this is noticed long before the next full pass.
        engine_id = (await caller.get("plain")).status.engine_id
        rig.engine.call("POST", f"/containers/{engine_id}/kill")
        await until_state(caller, "plain", EXITED)
    assert daemon.running
    assert "Traceback" not in daemon.log_text
