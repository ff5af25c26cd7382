"""Host paths: no change of the mounted folders gives a tenant access to other files of the host."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2, container_revision_pb2, operation_service_pb2

from tests.calls import Caller, failure
from tests.engine.drift import REPORTED, docker_inspect, wait_for_drift
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until, until_state
from tests.faults.instrumented_daemon import DIE_AT, KIND
from tests.faults.invariants import bound_host_paths
from tests.rig import Daemon, Rig

__all__ = ["daemons"]

ALWAYS = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED


@dataclass
class Host:
    """An allowed folder, a folder that is not allowed and whose name begins with the same letters, and a daemon."""

    rig: Rig
    daemons: IsolatedDaemons
    daemon: Daemon
    allowed: Path
    secret: Path
    left: frozenset[str]

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of the daemon."""
        return ("--allowed-host-paths", str(self.allowed))

    def mount(self, path: str, target: str, *, read_only: bool = False) -> container_pb2.Mount:
        """A mount of a path below the allowed folder."""
        return container_pb2.Mount(host_path=str(self.allowed / path), target=target, read_only=read_only)

    def binds(self) -> list[str]:
        """The targets of bound host paths, without those that killed daemons of other tests left on the rig."""
        return [target for target in bound_host_paths(self.rig) if target not in self.left]


@pytest.fixture
def folders() -> Iterator[Path]:
    """Two folders whose names begin with the same letters."""
    with tempfile.TemporaryDirectory(prefix="gpudock-test-") as folder:
        (Path(folder) / "srv/u/sub").mkdir(parents=True)
        (Path(folder) / "srv/u/sub/name").write_text("sub")
        (Path(folder) / "srv-secret").mkdir()
        (Path(folder) / "srv-secret/key").write_text("secret")
        yield Path(folder)


@pytest_asyncio.fixture
async def host(daemons: IsolatedDaemons, folders: Path) -> Host:
    """A daemon that allows one of the folders as a host path."""
    left = frozenset(bound_host_paths(daemons.rig))
    daemon = await daemons.start("--allowed-host-paths", str(folders / "srv"), "--orphan-grace", "0")
    return Host(daemons.rig, daemons, daemon, folders / "srv", folders / "srv-secret", left)


@pytest_asyncio.fixture
async def path_caller(host: Host) -> AsyncIterator[Caller]:
    """A caller of the daemon of `host`; asserts that no host path is bound after all containers are deleted."""
    async with Caller(host.daemon.target) as caller:
        yield caller
        if host.daemon.running:
            await caller.delete_all()
    assert host.binds() == []


async def restarted_by_engine(host: Host, path_caller: Caller, name: str, script: str) -> bool:
    """Run a script in a container and end its main process; whether the engine could restart the container."""
    engine_id = (await path_caller.get(name)).status.engine_id
    before = (await asyncio.to_thread(docker_inspect, host.rig, engine_id))["State"]["StartedAt"]
    await path_caller.run(name, "sh", "-c", f"{script}; kill -TERM 1")
    state: dict[str, Any] = {}

    async def has_restarted_or_failed() -> bool:
        state.update((await asyncio.to_thread(docker_inspect, host.rig, engine_id))["State"])
        if state["Running"]:
            # The engine also reports Running while a container waits for its restart.
            return bool(state["StartedAt"] != before and not state["Restarting"])
        return bool(state["Error"])

    await until(has_restarted_or_failed)
    return bool(state["Running"])


async def require_unreachable(host: Host, path_caller: Caller, name: str) -> None:
    """Assert that a container can neither read nor write files outside the allowed folder."""
    key = f"/s{host.secret}/key"
    assert (await path_caller.run(name, "cat", key)).code != 0
    await path_caller.run(name, "sh", "-c", f"echo broken > {key}")
    assert (host.secret / "key").read_text() == "secret"
    assert (await path_caller.run(name, "test", "-d", "/s/proc")).code != 0


SWAP = "mv /m/sub /m/moved && ln -s / /m/sub"


# -- folders that a container replaces -------------------------------------------------------------------------------


@pytest.mark.deep
async def test_engine_restart_after_a_swap_within_one_container(host: Host, path_caller: Caller) -> None:
    mounts = [host.mount("u", "/m"), host.mount("u/sub", "/s")]
    await path_caller.create("evil", restart_policy=ALWAYS, mounts=mounts)
    assert await restarted_by_engine(host, path_caller, "evil", SWAP)
    assert (host.allowed / "u/sub").is_symlink()
    await require_unreachable(host, path_caller, "evil")
    # The mount is still of the original folder, which was moved.
    assert await path_caller.shell("evil", "cat /s/name") == "sub"


@pytest.mark.deep
async def test_engine_restart_after_a_swap_by_another_container(host: Host, path_caller: Caller) -> None:
    await path_caller.create("victim", restart_policy=ALWAYS, mounts=[host.mount("u/sub", "/s", read_only=True)])
    await path_caller.create("helper", mounts=[host.mount("u", "/m")])
    await path_caller.shell("helper", SWAP)
    assert await restarted_by_engine(host, path_caller, "victim", "true")
    await require_unreachable(host, path_caller, "victim")
    assert await path_caller.shell("victim", "cat /s/name") == "sub"
    assert (await path_caller.run("victim", "touch", "/s/new")).code != 0


@pytest.mark.deep
async def test_engine_restart_after_a_folder_is_deleted_and_replaced(host: Host, path_caller: Caller) -> None:
    """A deleted folder cannot be bind mounted, so that the engine cannot start the container."""
    mounts = [host.mount("u", "/m"), host.mount("u/sub", "/s")]
    await path_caller.create("evil", restart_policy=ALWAYS, mounts=mounts)
    assert not await restarted_by_engine(host, path_caller, "evil", "rm -r /m/sub && ln -s / /m/sub")
    assert (await failure(path_caller.restart("evil"))).reason == "HOST_PATH_FORBIDDEN"


async def test_a_swapped_folder_is_refused_before_the_container_is_stopped(host: Host, path_caller: Caller) -> None:
    mounts = [host.mount("u", "/m"), host.mount("u/sub", "/s")]
    before = await path_caller.create("evil", mounts=mounts)
    await path_caller.shell("evil", SWAP)
    for call in (path_caller.restart("evil"), path_caller.scale("evil", 1), path_caller.update("evil", env={"A": "b"})):
        refused = await failure(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "HOST_PATH_FORBIDDEN")
        assert refused.metadata["host_path"] == str(host.allowed / "u/sub")
        assert refused.metadata["detail"] == f"{host.allowed}/u/sub is a symbolic link"
    after = await path_caller.get("evil")
    assert (after.status.state, after.status.start_time) == (RUNNING, before.status.start_time)
    await path_caller.shell("evil", "rm /m/sub && mv /m/moved /m/sub")
    await path_caller.restart("evil")
    assert await path_caller.shell("evil", "cat /s/name") == "sub"


async def test_a_start_by_the_daemon_mounts_the_current_folder_of_the_path(host: Host, path_caller: Caller) -> None:
    await path_caller.create("user", mounts=[host.mount("u/sub", "/s")])
    (host.allowed / "u/sub").rename(host.allowed / "u/old")
    (host.allowed / "u/sub").mkdir()
    (host.allowed / "u/sub/name").write_text("other")
    await path_caller.restart("user")
    assert await path_caller.shell("user", "cat /s/name") == "other"


# -- paths that may be mounted ---------------------------------------------------------------------------------------


async def test_a_link_or_a_path_outside_the_allow_list_is_refused(host: Host, path_caller: Caller) -> None:
    (host.allowed / "link").symlink_to(host.secret)
    (host.allowed / "u/inner").symlink_to("sub")
    refused = {
        "link": f"{host.allowed}/link is a symbolic link",
        "link/key": f"{host.allowed}/link is a symbolic link",
        "u/inner": f"{host.allowed}/u/inner is a symbolic link",
        "nothing": f"{host.allowed}/nothing: No such file or directory",
        "u/sub/name/x": f"{host.allowed}/u/sub/name/x: Not a directory",
    }
    for path, detail in refused.items():
        error = await failure(path_caller.create("none", mounts=[host.mount(path, "/s")]))
        assert (error.reason, error.metadata["detail"]) == ("HOST_PATH_FORBIDDEN", detail)
    # The name of the first folder begins with that of the allowed folder `srv`.
    for outside in (host.secret, host.secret / "key", host.allowed.parent, Path("/")):
        mount = container_pb2.Mount(host_path=str(outside), target="/s")
        error = await failure(path_caller.create("none", mounts=[mount]))
        assert (error.reason, error.metadata["allowed"]) == ("HOST_PATH_FORBIDDEN", str(host.allowed))
        assert error.metadata["detail"] == "not below any of allowed_host_paths"
    plain = f"{host.allowed}/u/sub"
    for spelling in (f"/{plain}", f"{host.allowed}//u/sub", f"{host.allowed}/./u/sub", f"{plain}/"):
        mount = container_pb2.Mount(host_path=spelling, target="/s")
        error = await failure(path_caller.create("none", mounts=[mount]))
        assert error.metadata["detail"] == (f"host path must not contain `//`, `.`, `..` or end in `/`; use {plain}")


async def test_a_file_a_read_only_folder_and_the_allowed_folder_can_be_mounted(host: Host, path_caller: Caller) -> None:
    mounts = [
        host.mount("u/sub/name", "/file"),
        host.mount("u/sub/name", "/same", read_only=True),
        host.mount("u", "/ro", read_only=True),
        container_pb2.Mount(host_path=str(host.allowed), target="/all"),
    ]
    container = await path_caller.create("user", mounts=mounts)
    assert list(container.spec.mounts) == mounts
    await path_caller.shell("user", "echo new > /file")
    assert await path_caller.shell("user", "cat /same /ro/sub/name /all/u/sub/name") == "new\n" * 3
    for path in ("/same", "/ro/sub/name", "/ro/created"):
        assert (await path_caller.run("user", "sh", "-c", f"echo x > {path}")).code != 0
    assert len(host.binds()) == 3
    modes = await asyncio.to_thread(host.rig.run, "find", "/run/gpudock-host-paths", "-maxdepth", "2", "-printf", "%m ")
    # The folder of all targets, that of the installation and that of the container.
    assert len(modes.stdout.split()) >= 3
    assert set(modes.stdout.split()) == {"700"}
    await path_caller.scale("user", 1)
    assert await path_caller.shell("user", "cat /file") == "new\n"
    # The bind mounts of the old engine container were released with it.
    assert len(host.binds()) == 3


async def test_a_mount_includes_mounts_of_the_host_below_its_path(host: Host, path_caller: Caller) -> None:
    host.rig.run("mount", "-t", "tmpfs", "inner", str(host.allowed / "u/sub"))
    try:
        host.rig.run("touch", str(host.allowed / "u/sub/inner"))
        await path_caller.create("user", mounts=[host.mount("u", "/m")])
        assert (await path_caller.shell("user", "ls /m/sub")).split() == ["inner"]
        await path_caller.delete("user")
        assert host.binds() == []
    finally:
        host.rig.run("umount", str(host.allowed / "u/sub"))


# -- release of bind mounts ------------------------------------------------------------------------------------------


async def test_a_create_that_fails_leaves_no_bind_mount(host: Host, path_caller: Caller) -> None:
    error = await failure(path_caller.create("none", command=("/no/such",), mounts=[host.mount("u", "/m")]))
    assert error.reason == "START_FAILED"
    assert host.binds() == []
    assert list((host.daemon.state_dir / "host-paths").iterdir()) == []


async def test_a_resumed_operation_checks_its_recorded_host_paths_again(host: Host, path_caller: Caller) -> None:
    """The daemon is killed between the check and the bind; then another container swaps the folder."""
    await path_caller.create("helper", mounts=[host.mount("u", "/m")])
    await stop_daemon(host.daemon)
    environment = {KIND: "CREATE", DIE_AT: "2"}
    killed_daemon = await host.daemons.start(
        *host.flags, module="tests.faults.instrumented_daemon", environment=environment, after=host.daemon
    )
    async with Caller(killed_daemon.target) as caller:
        assert (await failure(caller.create("evil", mounts=[host.mount("u/sub", "/s")]))).reason == ""
    assert await asyncio.to_thread(killed_daemon.wait) == -9
    assert "before HostPaths.bind" in killed_daemon.log_text
    (host.allowed / "u/sub").rename(host.allowed / "u/moved")
    (host.allowed / "u/sub").symlink_to("/")
    daemon = await host.daemons.start(*host.flags, after=killed_daemon)
    async with Caller(daemon.target) as caller:
        await caller.until_idle()
        assert (await failure(caller.get("evil"))).reason == "CONTAINER_NOT_FOUND"
        listed = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest())
        (operation,) = [operation for operation in listed.operations if operation.target.name == "evil"]
        assert "is a symbolic link" in operation.error.message
        await caller.delete_all()


async def test_bind_mounts_are_made_in_the_mount_namespace_of_the_engine(host: Host, folders: Path) -> None:
    """The binder runs in another mount namespace, like a daemon under systemd."""
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from gpudock_server.adapters.host_paths import HostPathBinder, MountNamespace\n"
        "binder = HostPathBinder(Path(sys.argv[1]), [sys.argv[2]], MountNamespace(sys.argv[3]))\n"
        "asyncio.run(getattr(binder, sys.argv[4])('gpudock-x', *([[sys.argv[2]]] if sys.argv[4] == 'bind' else [])))\n"
    )
    words = (str(folders / "state"), str(host.allowed), str(host.rig.engine.socket))
    inside = ("unshare", "--mount", "--propagation", "private", sys.executable, "-c", script, *words)
    host.rig.run(*inside, "bind")
    (bound,) = host.binds()
    assert host.rig.run("cat", f"{bound}/u/sub/name").stdout == "sub"
    host.rig.run(*inside, "release")
    assert host.binds() == []
    assert (host.allowed / "u/sub/name").read_text() == "sub"


@pytest.mark.usefixtures("path_caller")
async def test_bind_mounts_of_a_container_that_docker_removed_are_released(host: Host) -> None:
    daemon = await host.daemons.start(*host.flags, "--reconcile-interval", "0.5", after=await stop_daemon(host.daemon))
    async with Caller(daemon.target) as caller:
        made = await caller.create("user", mounts=[host.mount("u", "/m")])
        path = f"/containers/{made.status.engine_id}?force=1"
        await asyncio.to_thread(host.rig.engine.call, "DELETE", path)

        async def are_released() -> bool:
            return not host.binds()

        await until(are_released)
        # The release unmounts, and does not delete files of the host.
        assert (host.allowed / "u/sub/name").read_text() == "sub"
        await caller.delete("user")


@pytest.mark.deep
@pytest.mark.usefixtures("path_caller")
async def test_attach_volumes_binds_allowed_host_paths_after_a_boot(host: Host) -> None:
    """It runs before the engine starts its containers; a container whose host path is not bound does not start."""
    (host.allowed / "u/linked").mkdir()
    (host.allowed.parent / "srv2").mkdir()
    both = await host.daemons.start(
        *host.flags, "--allowed-host-paths", str(host.allowed.parent / "srv2"), after=await stop_daemon(host.daemon)
    )
    async with Caller(both.target) as caller:
        await caller.create("fine", restart_policy=ALWAYS, mounts=[host.mount("u/sub", "/s"), host.mount("u", "/m")])
        await caller.create("linked", restart_policy=ALWAYS, mounts=[host.mount("u/linked", "/s")])
        other = container_pb2.Mount(host_path=str(host.allowed.parent / "srv2"), target="/s")
        await caller.create("forbidden", restart_policy=ALWAYS, mounts=[other])
        await caller.shell("fine", "rmdir /m/linked && ln -s / /m/linked")
    await stop_daemon(both)
    # This thread waits for the programs: the event loop has no other task.
    with host.rig.engine.down():
        # A boot removes all bind mounts and files in memory, also those of other tests.
        for target in bound_host_paths(host.rig):
            host.rig.run("umount", target)
        host.rig.run("rm", "-r", "--one-file-system", "/run/gpudock-host-paths")
        state = ("--state-dir", str(host.daemon.state_dir))
        attach = host.rig.run(
            sys.executable, "-m", "gpudock_server", "--attach-volumes", *state, *host.flags, check=False
        )
        assert attach.returncode == 1
        assert attach.stdout.count("host path not bound") + attach.stderr.count("host path not bound") == 2
        assert len(bound_host_paths(host.rig)) == 2
    daemon = await host.daemons.start(*host.flags, after=both)
    async with Caller(daemon.target) as caller:
        await until_state(caller, "fine", RUNNING)
        assert await caller.shell("fine", "cat /s/name") == "sub"
        for name in ("linked", "forbidden"):
            assert (await caller.get(name)).status.state == EXITED
            assert (await wait_for_drift(caller, "HOST_PATH_REFUSED", container=name)).remedy == REPORTED
            assert (await failure(caller.start(name))).reason == "HOST_PATH_FORBIDDEN"
        await caller.delete_all()


@pytest.mark.deep
async def test_an_unbound_host_path_of_an_older_version_is_reported_and_replaced(
    host: Host, path_caller: Caller
) -> None:
    """An older version gave the host path itself to the engine."""
    made = await path_caller.create("old", mounts=[host.mount("u/sub", "/s")])
    state = docker_inspect(host.rig, made.status.engine_id)
    await stop_daemon(host.daemon)
    host.rig.engine.call("DELETE", f"/containers/{made.status.engine_id}?force=1")
    older = {**state["Config"], "HostConfig": state["HostConfig"]}
    older["HostConfig"]["Mounts"][0]["Source"] = str(host.allowed / "u/sub")
    name = state["Name"].removeprefix("/")
    engine_id = host.rig.engine.call("POST", f"/containers/create?name={name}", send=older)["Id"]
    host.rig.engine.call("POST", f"/containers/{engine_id}/start")
    # A daemon without the record, under another prefix in etcd, adopts the engine container.
    daemon = await host.daemons.start(
        *host.flags, "--reconcile-interval", "0.5", "--etcd-prefix", f"/x{host.daemons.prefix}", after=host.daemon
    )
    async with Caller(daemon.target) as caller:
        assert (await wait_for_drift(caller, "HOST_PATH_UNBOUND", container="old")).actual == str(
            host.allowed / "u/sub"
        )
        assert (await caller.get("old")).status.engine_id == engine_id
        await caller.restart("old")
        restarted = await caller.get("old")
        assert restarted.status.engine_id != engine_id
        (mount,) = docker_inspect(host.rig, restarted.status.engine_id)["Mounts"]
        assert mount["Source"] in host.binds()
        assert await caller.shell("old", "cat /s/name") == "sub"
        assert (await caller.revisions("old"))[-1].cause == container_revision_pb2.REVISION_CAUSE_RESTARTED
        await caller.delete_all()


async def stop_daemon(daemon: Daemon) -> Daemon:
    """Stop a daemon; returns it."""
    assert await asyncio.to_thread(daemon.stop) == 0
    return daemon
