"""Effects of settings in a running daemon, which show that `app.py` passes each setting on.

Invalid values are tested in tests/unit/test_settings.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import shutil
import signal
import stat
import time
from datetime import timedelta
from pathlib import Path

import pytest
from gpudock.v1 import container_pb2, operation_service_pb2
from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.keys import Keys
from gpudock_server.settings.definitions import default_host_id

from tests.calls import Caller, failure
from tests.engine.drift import docker_inspect, state_of
from tests.engine.etcd_examples import open_connection
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.rig import BUSYBOX, Daemon, Rig
from tests.rig.etcd import find_etcd
from tests.rig.patience import limit
from tests.rpc.certificates import Authority

__all__ = ["daemons"]

_ALWAYS = container_pb2.SNAPSHOT_POLICY_ALWAYS
_NEVER = container_pb2.SNAPSHOT_POLICY_NEVER
_VOLUME_SIZE = 320 << 20
# Part of the command line of the child process that works on the files of layers and volumes.
_TREE_CHILD = b"host.trees.child"
# Exits two seconds after SIGTERM.
_EXIT_CODE = 7
_SLOW_TO_STOP = (
    *("sh", "-c"),
    f"trap 'sleep 2; exit {_EXIT_CODE}' TERM; : > /ready; while :; do sleep 0.1; done",
)


# -- retention and snapshots -------------------------------------------------------------------------------------------


async def test_operation_retention_is_the_least_time_that_an_ended_operation_is_kept(daemons: IsolatedDaemons) -> None:
    retention = 100_000
    daemon = await daemons.start("--operation-retention", str(retention))
    async with Caller(daemon.target) as caller, open_connection(daemons.rig.etcd.endpoint) as connection:
        await caller.create("kept")
        (operation,) = (
            await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest())
        ).operations
        response = await connection.read(
            messages.get(Keys(daemons.prefix).operation(operation.id)), retry_for=timedelta(seconds=5)
        )
        operation_key = response.ranges[0].only
        assert operation_key is not None
        remaining = (await connection._client.get_lease_info(operation_key.lease)).TTL
        # Operations that end within the same hour share a lease, so that some are kept for two hours longer.
        assert retention - 60 <= remaining <= retention + 2 * 3600
        await caller.delete("kept")


async def test_snapshot_dir_holds_the_snapshots_and_snapshot_policy_turns_them_off(daemons: IsolatedDaemons) -> None:
    folder = daemons.rig.folder / f"snapshots-{daemons.id}"
    daemon = await daemons.start("--snapshot-dir", str(folder))
    async with Caller(daemon.target) as caller:
        await caller.create("past")
        await caller.shell("past", "echo kept > /file")
        await caller.update("past", hostname="second")
        paths = [path for path in folder.rglob("file") if path.read_text() == "kept\n"]
        assert paths, "snapshot_dir has no file of revision 1"
        assert (await caller.revisions("past"))[0].snapshot.kind
    await asyncio.to_thread(daemon.stop)
    successor = await daemons.start("--snapshot-dir", str(folder), "--snapshot-policy", "never", after=daemon)
    async with Caller(successor.target) as caller:
        await caller.update("past", hostname="third")
        first, second, _ = await caller.revisions("past")
        assert first.snapshot.kind, "an existing snapshot was removed"
        assert not second.snapshot.kind, "the policy of the daemon allows no snapshot"
        # The policy of a container overrides that of the daemon.
        await caller.update("past", revision_policy=container_pb2.RevisionPolicy(snapshots=_ALWAYS))
        await caller.update("past", hostname="fourth")
        assert (await caller.revisions("past"))[3].snapshot.kind
        await caller.delete("past")
    assert not [path for path in folder.rglob("*") if path.is_file()], "the snapshots of a deleted container remain"


@pytest.mark.deep
async def test_snapshot_max_entries_lets_a_change_of_a_larger_layer_be_made_without_a_snapshot(
    daemons: IsolatedDaemons,
) -> None:
    daemon = await daemons.start("--snapshot-max-entries", "1000")
    async with Caller(daemon.target) as caller:
        await caller.create("large")
        await caller.shell("large", "mkdir /many; i=0; while [ $i -lt 1000 ]; do : > /many/$i; i=$((i+1)); done")
        assert (await failure(caller.update("large", hostname="second", snapshots=_ALWAYS))).reason == "SNAPSHOT_FAILED"
        await caller.update("large", hostname="second")
        first, second = await caller.revisions("large")
        assert "more than 1000 files and folders" in first.snapshot_warning
        assert not first.HasField("snapshot")
        assert second.snapshot_warning == ""
        refused = await failure(caller.rollback("large", 1))
        assert refused.reason == "SNAPSHOT_NOT_FOUND"
        await caller.shell("large", "rm -r /many")
        await caller.update("large", hostname="third")
        assert (await caller.revisions("large"))[1].snapshot.kind
        await caller.delete("large")


@pytest.mark.deep
async def test_keep_revisions_for_prunes_revisions_that_were_replaced_long_ago(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--keep-revisions-for", "1", "--reconcile-interval", "0.5")
    async with Caller(daemon.target) as caller:
        await caller.create("past")
        await caller.update("past", hostname="second")

        async def is_pruned() -> bool:
            return [revision.revision for revision in await caller.revisions("past")] == [2]

        await until(is_pruned)
        # The time of the container overrides that of the daemon.
        policy = container_pb2.RevisionPolicy()
        policy.keep_for.seconds = 3600
        await caller.update("past", revision_policy=policy)
        await caller.update("past", hostname="fourth")
        # The pass that prunes `sentinel` also examines `past`.
        await caller.create("sentinel")
        await caller.update("sentinel", hostname="second")

        async def pass_is_over() -> bool:
            return [revision.revision for revision in await caller.revisions("sentinel")] == [2]

        await until(pass_is_over)
        assert [revision.revision for revision in await caller.revisions("past")] == [2, 3, 4]
        await caller.delete("past")
        await caller.delete("sentinel")


# -- host, socket, log and containers ----------------------------------------------------------------------------------


async def test_settings_of_the_host_the_socket_the_log_and_the_containers(daemons: IsolatedDaemons) -> None:
    """One daemon has all of these settings, because their effects are independent."""
    daemon = await daemons.start(
        *("--host-id", "another.machine", "--socket-mode", "0600", "--log-level", "warning"),
        *("--allowed-nvidia-switches", "NVIDIA_GDS", "--stop-timeout", "0"),
    )
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
    # The daemon logs at level info when it begins to serve, and for each call.
    assert "[info" not in daemon.log_text
    async with Caller(daemon.target) as caller, state_of(daemons, daemons.rig) as state:
        switches = {"NVIDIA_GDS": "enabled", "NVIDIA_MOFED": "enabled"}
        created = await caller.create("one", 1, env=switches, command=_SLOW_TO_STOP)
        # GPUs are allocated, claimed and listed for the same host id.
        other = await caller.create("other", 7)
        assert not set(created.status.gpu_uuids) & set(other.status.gpu_uuids)
        assert await caller.free_gpus() == 0
        assert [node.host for node in await state.store.nodes()] == ["another.machine"]
        claimed = {"another.machine": 8, default_host_id(): 0}
        for host, count in claimed.items():
            assert len((await state.store.claims(host)).claims) == count, host
        environment = docker_inspect(daemons.rig, created.status.engine_id)["Config"]["Env"]
        assert "NVIDIA_GDS=enabled" in environment
        assert "NVIDIA_MOFED=disabled" in environment

        async def is_ready() -> bool:
            return (await caller.run("one", "test", "-e", "/ready")).code == 0

        await until(is_ready)
        assert (await caller.stop("one")).status.exit_code == 128 + signal.SIGKILL
        await caller.delete("one")
        await caller.delete("other")
    await asyncio.to_thread(daemon.stop)
    assert "[info" not in daemon.log_text

    group = next(group for group in grp.getgrall() if group.gr_gid not in (0, os.getegid()))
    successor = await daemons.start(
        *("--socket-group", group.gr_name, "--log-level", "debug", "--stop-timeout", "60"), after=daemon
    )
    assert successor.socket.stat().st_gid == group.gr_gid
    assert stat.S_IMODE(successor.socket.stat().st_mode) == 0o660
    assert "[debug" in successor.log_text
    async with Caller(successor.target) as caller:
        await caller.create("one", command=_SLOW_TO_STOP)

        async def is_ready_again() -> bool:
            return (await caller.run("one", "test", "-e", "/ready")).code == 0

        await until(is_ready_again)
        assert (await caller.stop("one")).status.exit_code == _EXIT_CODE
        await caller.delete("one")


# -- stall timeout -----------------------------------------------------------------------------------------------------


def _children(pid: int) -> list[int]:
    """The ids of the child processes of a process, with zombies."""
    operation_key: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            operation_key += map(int, (thread / "children").read_text().split())
    return operation_key


def _freeze_child(daemon: Daemon, word: bytes, seconds: float = 60) -> None:
    """Wait until a daemon has a child with `word` in its command line, and send SIGSTOP to it."""
    deadline = time.monotonic() + limit(seconds)
    while time.monotonic() < deadline:
        for pid in _children(daemon.process.pid):
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGSTOP)
                    return
        # The kernel has no event for a new child, which must be stopped before it is done.
        time.sleep(0.001)
    raise AssertionError(f"no child of the daemon has {word!r} in its command line")


@pytest.mark.deep
@pytest.mark.timeout(300)
async def test_stall_timeout_ends_snapshots_and_copies_without_progress(daemons: IsolatedDaemons) -> None:
    """Of a snapshot, a copy of a layer and a copy of a volume. The default of the setting is 120 s."""
    daemon = await daemons.start("--stall-timeout", "10", "--layer-carry", "copy", "--volume-backend", "loop")
    message = "made no progress for 10 s"
    async with Caller(daemon.target) as caller:
        for policy, reason in {_ALWAYS: "SNAPSHOT_FAILED", _NEVER: "LAYER_CARRY_FAILED"}.items():
            await caller.create("one", revision_policy=container_pb2.RevisionPolicy(snapshots=policy))
            freezing = asyncio.create_task(asyncio.to_thread(_freeze_child, daemon, _TREE_CHILD))
            refused = await failure(caller.update("one", hostname="second"))
            await freezing
            assert refused.reason == reason
            assert message in refused.message
            await caller.delete("one")

        await caller.create_volume("data", 2 * _VOLUME_SIZE)
        freezing = asyncio.create_task(asyncio.to_thread(_freeze_child, daemon, _TREE_CHILD))
        refused = await failure(caller.resize_volume("data", _VOLUME_SIZE))
        await freezing
        assert refused.reason == "VOLUME_FAILED"
        assert message in refused.message
        await caller.delete_volume("data")


# -- etcd with TLS, a client certificate and a password ----------------------------------------------------------------


class SecureEtcd:
    """An etcd on the rig's loopback that demands a client certificate, and a password after `require_password`."""

    endpoint = "127.0.0.1:23790"

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.authority = Authority(folder)
        self.server = self.authority.sign("server", "IP:127.0.0.1")
        self.client = self.authority.sign("client")
        self._rig = rig
        client, peer = f"https://{self.endpoint}", "http://127.0.0.1:23800"
        self._words = [
            *[str(find_etcd()), "--name", "one", "--data-dir", str(folder / "data"), "--unsafe-no-fsync"],
            *["--listen-client-urls", client, "--advertise-client-urls", client],
            *["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"one={peer}"],
            *["--cert-file", str(self.server.certificate), "--key-file", str(self.server.key)],
            *["--client-cert-auth", "--trusted-ca-file", str(self.authority.own.certificate)],
        ]
        self._log = folder / "log"

    def start(self) -> None:
        """Start etcd and wait until it is healthy."""
        processes = self._rig._processes
        assert processes is not None
        self._process = processes.start(self._words, log=self._log, inside=self._rig.namespaces.enter())
        self._process.wait_until(lambda: self.ctl("endpoint", "health", check=False) == 0)

    def stop(self) -> None:
        """Kill etcd."""
        self._process.kill9()

    def ctl(self, *arguments: str, check: bool = True) -> int:
        """Run etcdctl; returns its exit code."""
        command = [str(find_etcd().with_name("etcdctl")), "--endpoints", f"https://{self.endpoint}", *self.flags_of_ctl]
        return self._rig.run(*command, *arguments, check=check).returncode

    @property
    def flags_of_ctl(self) -> tuple[str, ...]:
        """Flags of etcdctl with the client certificate."""
        files = {
            "--cacert": self.authority.own.certificate,
            "--cert": self.client.certificate,
            "--key": self.client.key,
        }
        return tuple(str(word) for pair in files.items() for word in pair)

    def flags(self, *, certificate: bool = True) -> tuple[str, ...]:
        """Flags of gpudockd, with the client certificate unless `certificate` is false."""
        trust = ("--etcd-ca", str(self.authority.own.certificate))
        if not certificate:
            return trust
        return (*trust, "--etcd-cert", str(self.client.certificate), "--etcd-key", str(self.client.key))

    def require_password(self, password: str) -> None:
        """Create the user root, and demand its password from now on."""
        self.ctl("user", "add", f"root:{password}")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("auth", "enable")


@pytest.mark.deep
async def test_etcd_is_reached_with_a_certificate_and_a_password(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    etcd = SecureEtcd(daemons.rig, tmp_path)
    await asyncio.to_thread(etcd.start)
    try:
        error = await daemons.startup_error(*etcd.flags(certificate=False), etcd_endpoints=etcd.endpoint)
        assert f"etcd at {etcd.endpoint} does not answer" in error
        daemon = await daemons.start(*etcd.flags(), etcd_endpoints=etcd.endpoint)
        async with Caller(daemon.target) as caller:
            await caller.create("secure")
            assert [revision.cause for revision in await caller.revisions("secure")]
        await asyncio.to_thread(daemon.stop)

        await asyncio.to_thread(etcd.require_password, "opensesame")
        password = tmp_path / "password"
        password.write_text("wrong\n")
        password.chmod(0o600)
        user = ("--etcd-user", "root", "--etcd-password-file", str(password))
        error = await daemons.startup_error(*etcd.flags(), *user, etcd_endpoints=etcd.endpoint)
        assert "opensesame" not in error
        password.write_text("opensesame\n")
        successor = await daemons.start(*etcd.flags(), *user, etcd_endpoints=etcd.endpoint, after=daemon)
        async with Caller(successor.target) as caller:
            assert (await caller.get("secure")).spec.command
            await caller.delete("secure")
    finally:
        etcd.stop()


# -- the engine with TLS -----------------------------------------------------------------------------------------------


@pytest.mark.deep
async def test_the_engine_is_reached_with_tls(tmp_path: Path) -> None:
    """The TLS of dockerd, on a separate rig whose engine also listens on TCP."""
    authority, address = Authority(tmp_path), "tcp://127.0.0.1:2376"
    server, client = authority.sign("server", "IP:127.0.0.1"), authority.sign("client")
    options = (
        *("-H", address, "--tlsverify", "--tlscacert", str(authority.own.certificate)),
        *("--tlscert", str(server.certificate), "--tlskey", str(server.key)),
    )
    folder = tmp_path / "tls"
    folder.mkdir(mode=0o700)
    for name, path in {"ca": authority.own.certificate, "cert": client.certificate, "key": client.key}.items():
        shutil.copy(path, folder / f"{name}.pem")
        (folder / f"{name}.pem").chmod(0o600)
    with Rig(gpus=1, images=(BUSYBOX,), engine_options=options) as rig:
        daemons = IsolatedDaemons(rig)
        daemon = await daemons.start("--docker-tls-dir", str(folder), docker_host=address)
        async with Caller(daemon.target) as caller:
            await caller.create("far", 1)
            assert await caller.shell("far", "echo here") == "here\n"
            await caller.delete("far")
        await asyncio.to_thread(daemon.stop)
        # A certificate of another authority is refused.
        other = Authority(tmp_path, "other").sign("stranger")
        for name, path in {"cert": other.certificate, "key": other.key}.items():
            shutil.copy(path, folder / f"{name}.pem")
        assert address in await daemons.startup_error("--docker-tls-dir", str(folder), docker_host=address)
