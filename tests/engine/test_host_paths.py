"""Host paths: what a tenant does to the folders that it mounts never shows it anything else of the host."""

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
    """A folder that may be mounted, one that may not and begins with the same letters, and a daemon with this rule."""

    rig: Rig
    daemons: IsolatedDaemons
    daemon: Daemon
    allowed: Path
    secret: Path
    left: frozenset[str]

    @property
    def flags(self) -> tuple[str, ...]:
        """What the daemon was told of it."""
        return ("--allowed-host-paths", str(self.allowed))

    def mount(self, path: str, target: str, *, read_only: bool = False) -> container_pb2.Mount:
        """A mount of something below the allowed folder."""
        return container_pb2.Mount(host_path=str(self.allowed / path), target=target, read_only=read_only)

    def binds(self) -> list[str]:
        """Where host paths are bound now, but for what killed daemons of other tests left on the same rig."""
        return [place for place in bound_host_paths(self.rig) if place not in self.left]


@pytest.fixture
def folders() -> Iterator[Path]:
    """Two folders whose names begin alike."""
    with tempfile.TemporaryDirectory(prefix="gpudock-test-") as folder:
        (Path(folder) / "srv/u/sub").mkdir(parents=True)
        (Path(folder) / "srv/u/sub/name").write_text("sub")
        (Path(folder) / "srv-secret").mkdir()
        (Path(folder) / "srv-secret/key").write_text("secret")
        yield Path(folder)


@pytest_asyncio.fixture
async def host(daemons: IsolatedDaemons, folders: Path) -> Host:
    """A daemon that lets these folders be mounted."""
    left = frozenset(bound_host_paths(daemons.rig))
    daemon = await daemons.start("--allowed-host-paths", str(folders / "srv"), "--orphan-grace", "0")
    return Host(daemons.rig, daemons, daemon, folders / "srv", folders / "srv-secret", left)


@pytest_asyncio.fixture
async def tenant(host: Host) -> AsyncIterator[Caller]:
    """Calls that daemon; when all is deleted nothing is bound any more."""
    async with Caller(host.daemon.target) as caller:
        yield caller
        if host.daemon.running:
            await caller.delete_all()
    assert host.binds() == []


async def restarted_by_engine(host: Host, tenant: Caller, name: str, script: str) -> bool:
    """Do something inside and end the first process; whether the engine could start the container again."""
    engine_id = (await tenant.get(name)).status.engine_id
    before = (await asyncio.to_thread(docker_inspect, host.rig, engine_id))["State"]["StartedAt"]
    await tenant.run(name, "sh", "-c", f"{script}; kill -TERM 1")
    state: dict[str, Any] = {}

    async def tried() -> bool:
        state.update((await asyncio.to_thread(docker_inspect, host.rig, engine_id))["State"])
        if state["Running"]:
            # It also says so while it waits for its restart.
            return bool(state["StartedAt"] != before and not state["Restarting"])
        return bool(state["Error"])

    await until(tried)
    return bool(state["Running"])


async def cannot_reach(host: Host, tenant: Caller, name: str) -> None:
    """Neither read nor write what is not below the allowed folder."""
    key = f"/s{host.secret}/key"
    assert (await tenant.run(name, "cat", key)).code != 0
    await tenant.run(name, "sh", "-c", f"echo broken > {key}")
    assert (host.secret / "key").read_text() == "secret"
    assert (await tenant.run(name, "test", "-d", "/s/proc")).code != 0


SWAP = "mv /m/sub /m/moved && ln -s / /m/sub"


# -- what a container exchanges --------------------------------------------------------------------------------------


@pytest.mark.deep
async def test_engine_restart_after_a_swap_within_one_container(host: Host, tenant: Caller) -> None:
    mounts = [host.mount("u", "/m"), host.mount("u/sub", "/s")]
    await tenant.create("evil", restart_policy=ALWAYS, mounts=mounts)
    assert await restarted_by_engine(host, tenant, "evil", SWAP)
    assert (host.allowed / "u/sub").is_symlink()
    await cannot_reach(host, tenant, "evil")
    # It is the folder that it was, wherever that is now.
    assert await tenant.shell("evil", "cat /s/name") == "sub"


@pytest.mark.deep
async def test_engine_restart_after_a_swap_by_another_container(host: Host, tenant: Caller) -> None:
    await tenant.create("victim", restart_policy=ALWAYS, mounts=[host.mount("u/sub", "/s", read_only=True)])
    await tenant.create("helper", mounts=[host.mount("u", "/m")])
    await tenant.shell("helper", SWAP)
    assert await restarted_by_engine(host, tenant, "victim", "true")
    await cannot_reach(host, tenant, "victim")
    assert await tenant.shell("victim", "cat /s/name") == "sub"
    assert (await tenant.run("victim", "touch", "/s/new")).code != 0


@pytest.mark.deep
async def test_engine_restart_after_a_folder_is_deleted_and_replaced(host: Host, tenant: Caller) -> None:
    """No bind mount of a folder that is deleted can be made: the container ends, and shows nothing else."""
    mounts = [host.mount("u", "/m"), host.mount("u/sub", "/s")]
    await tenant.create("evil", restart_policy=ALWAYS, mounts=mounts)
    assert not await restarted_by_engine(host, tenant, "evil", "rm -r /m/sub && ln -s / /m/sub")
    assert (await failure(tenant.restart("evil"))).reason == "HOST_PATH_FORBIDDEN"


async def test_what_was_swapped_is_refused_before_anything_stops(host: Host, tenant: Caller) -> None:
    mounts = [host.mount("u", "/m"), host.mount("u/sub", "/s")]
    before = await tenant.create("evil", mounts=mounts)
    await tenant.shell("evil", SWAP)
    for call in (tenant.restart("evil"), tenant.scale("evil", 1), tenant.update("evil", env={"A": "b"})):
        refused = await failure(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "HOST_PATH_FORBIDDEN")
        assert refused.metadata["host_path"] == str(host.allowed / "u/sub")
        assert refused.metadata["detail"] == f"{host.allowed}/u/sub is a symbolic link"
    after = await tenant.get("evil")
    assert (after.status.state, after.status.start_time) == (RUNNING, before.status.start_time)
    await tenant.shell("evil", "rm /m/sub && mv /m/moved /m/sub")
    await tenant.restart("evil")
    assert await tenant.shell("evil", "cat /s/name") == "sub"


async def test_a_start_by_us_mounts_what_the_path_leads_to_now(host: Host, tenant: Caller) -> None:
    await tenant.create("user", mounts=[host.mount("u/sub", "/s")])
    (host.allowed / "u/sub").rename(host.allowed / "u/old")
    (host.allowed / "u/sub").mkdir()
    (host.allowed / "u/sub/name").write_text("other")
    await tenant.restart("user")
    assert await tenant.shell("user", "cat /s/name") == "other"


# -- what may be mounted at all --------------------------------------------------------------------------------------


async def test_paths_that_are_refused(host: Host, tenant: Caller) -> None:
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
        answer = await failure(tenant.create("none", mounts=[host.mount(path, "/s")]))
        assert (answer.reason, answer.metadata["detail"]) == ("HOST_PATH_FORBIDDEN", detail)
    # Not below /…/srv, though the name begins with it.
    for outside in (host.secret, host.secret / "key", host.allowed.parent, Path("/")):
        mount = container_pb2.Mount(host_path=str(outside), target="/s")
        answer = await failure(tenant.create("none", mounts=[mount]))
        assert (answer.reason, answer.metadata["allowed"]) == ("HOST_PATH_FORBIDDEN", str(host.allowed))
        assert answer.metadata["detail"] == "not below any of allowed_host_paths"
    plain = f"{host.allowed}/u/sub"
    for spelling in (f"/{plain}", f"{host.allowed}//u/sub", f"{host.allowed}/./u/sub", f"{plain}/"):
        answer = await failure(tenant.create("none", mounts=[container_pb2.Mount(host_path=spelling, target="/s")]))
        assert answer.metadata["detail"] == (f"host path must not contain `//`, `.`, `..` or end in `/`; use {plain}")


async def test_files_read_only_mounts_and_the_allowed_folder_itself(host: Host, tenant: Caller) -> None:
    mounts = [
        host.mount("u/sub/name", "/file"),
        host.mount("u/sub/name", "/same", read_only=True),
        host.mount("u", "/ro", read_only=True),
        container_pb2.Mount(host_path=str(host.allowed), target="/all"),
    ]
    container = await tenant.create("user", mounts=mounts)
    assert list(container.spec.mounts) == mounts
    await tenant.shell("user", "echo new > /file")
    assert await tenant.shell("user", "cat /same /ro/sub/name /all/u/sub/name") == "new\n" * 3
    for path in ("/same", "/ro/sub/name", "/ro/created"):
        assert (await tenant.run("user", "sh", "-c", f"echo x > {path}")).code != 0
    assert len(host.binds()) == 3
    modes = await asyncio.to_thread(host.rig.run, "find", "/run/gpudock-host-paths", "-maxdepth", "2", "-printf", "%m ")
    # Root's, the installation's and the container's folder.
    assert len(modes.stdout.split()) >= 3
    assert set(modes.stdout.split()) == {"700"}
    await tenant.scale("user", 1)
    assert await tenant.shell("user", "cat /file") == "new\n"
    # The predecessor's are gone with it.
    assert len(host.binds()) == 3


async def test_mounts_of_the_host_below_a_path_are_seen(host: Host, tenant: Caller) -> None:
    host.rig.run("mount", "-t", "tmpfs", "inner", str(host.allowed / "u/sub"))
    try:
        host.rig.run("touch", str(host.allowed / "u/sub/inner"))
        await tenant.create("user", mounts=[host.mount("u", "/m")])
        assert (await tenant.shell("user", "ls /m/sub")).split() == ["inner"]
        await tenant.delete("user")
        assert host.binds() == []
    finally:
        host.rig.run("umount", str(host.allowed / "u/sub"))


# -- what is left ----------------------------------------------------------------------------------------------------


async def test_a_create_that_fails_leaves_nothing_bound(host: Host, tenant: Caller) -> None:
    answer = await failure(tenant.create("none", command=("/no/such",), mounts=[host.mount("u", "/m")]))
    assert answer.reason == "START_FAILED"
    assert host.binds() == []
    assert list((host.daemon.state_dir / "host-paths").iterdir()) == []


async def test_an_operation_that_is_taken_up_checks_what_it_recorded(host: Host, tenant: Caller) -> None:
    """Its daemon is killed after the check and before the bind; meanwhile another container swaps the folder."""
    await tenant.create("helper", mounts=[host.mount("u", "/m")])
    await stopped(host.daemon)
    environment = {KIND: "CREATE", DIE_AT: "2"}
    mortal = await host.daemons.start(
        *host.flags, module="tests.faults.instrumented_daemon", environment=environment, after=host.daemon
    )
    async with Caller(mortal.target) as caller:
        assert (await failure(caller.create("evil", mounts=[host.mount("u/sub", "/s")]))).reason == ""
    assert await asyncio.to_thread(mortal.wait) == -9
    assert "before HostPaths.bind" in mortal.log_text
    (host.allowed / "u/sub").rename(host.allowed / "u/moved")
    (host.allowed / "u/sub").symlink_to("/")
    daemon = await host.daemons.start(*host.flags, after=mortal)
    async with Caller(daemon.target) as caller:
        await caller.until_idle()
        assert (await failure(caller.get("evil"))).reason == "CONTAINER_NOT_FOUND"
        listed = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest())
        (operation,) = [one for one in listed.operations if one.target.name == "evil"]
        assert "is a symbolic link" in operation.error.message
        await caller.delete_all()


async def test_binds_are_made_where_the_engine_sees_them(host: Host, folders: Path) -> None:
    """Also by a daemon in a mount namespace of its own, which systemd gives it."""
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


@pytest.mark.usefixtures("tenant")
async def test_what_was_removed_outside_gpudock_is_released(host: Host) -> None:
    daemon = await host.daemons.start(*host.flags, "--reconcile-interval", "0.5", after=await stopped(host.daemon))
    async with Caller(daemon.target) as caller:
        made = await caller.create("user", mounts=[host.mount("u", "/m")])
        path = f"/containers/{made.status.engine_id}?force=1"
        await asyncio.to_thread(host.rig.engine.call, "DELETE", path)

        async def released() -> bool:
            return not host.binds()

        await until(released)
        # The attack, from the other side: what nobody deleted is still there.
        assert (host.allowed / "u/sub/name").read_text() == "sub"
        await caller.delete("user")


@pytest.mark.deep
@pytest.mark.usefixtures("tenant")
async def test_a_boot_binds_again_what_is_still_allowed(host: Host) -> None:
    """Before the engine starts its containers; what is not bound again has no source, so that it does not start."""
    (host.allowed / "u/linked").mkdir()
    (host.allowed.parent / "srv2").mkdir()
    both = await host.daemons.start(
        *host.flags, "--allowed-host-paths", str(host.allowed.parent / "srv2"), after=await stopped(host.daemon)
    )
    async with Caller(both.target) as caller:
        await caller.create("fine", restart_policy=ALWAYS, mounts=[host.mount("u/sub", "/s"), host.mount("u", "/m")])
        await caller.create("linked", restart_policy=ALWAYS, mounts=[host.mount("u/linked", "/s")])
        other = container_pb2.Mount(host_path=str(host.allowed.parent / "srv2"), target="/s")
        await caller.create("forbidden", restart_policy=ALWAYS, mounts=[other])
        await caller.shell("fine", "rmdir /m/linked && ln -s / /m/linked")
    await stopped(both)
    # These programs are awaited in this thread: nothing else of the test runs meanwhile.
    with host.rig.engine.down():
        # Nothing of memory survives a boot, what others left there neither.
        for place in bound_host_paths(host.rig):
            host.rig.run("umount", place)
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
async def test_one_that_an_older_version_made_is_reported_and_replaced(host: Host, tenant: Caller) -> None:
    """Its bind has the host path itself as the source."""
    made = await tenant.create("old", mounts=[host.mount("u/sub", "/s")])
    shown = docker_inspect(host.rig, made.status.engine_id)
    await stopped(host.daemon)
    host.rig.engine.call("DELETE", f"/containers/{made.status.engine_id}?force=1")
    older = {**shown["Config"], "HostConfig": shown["HostConfig"]}
    older["HostConfig"]["Mounts"][0]["Source"] = str(host.allowed / "u/sub")
    name = shown["Name"].removeprefix("/")
    engine_id = host.rig.engine.call("POST", f"/containers/create?name={name}", send=older)["Id"]
    host.rig.engine.call("POST", f"/containers/{engine_id}/start")
    # As after the loss of the record: it is adopted.
    daemon = await host.daemons.start(
        *host.flags, "--reconcile-interval", "0.5", "--etcd-prefix", f"/x{host.daemons.prefix}", after=host.daemon
    )
    async with Caller(daemon.target) as caller:
        assert (await wait_for_drift(caller, "HOST_PATH_UNBOUND", container="old")).actual == str(
            host.allowed / "u/sub"
        )
        assert (await caller.get("old")).status.engine_id == engine_id
        await caller.restart("old")
        now = await caller.get("old")
        assert now.status.engine_id != engine_id
        (mount,) = docker_inspect(host.rig, now.status.engine_id)["Mounts"]
        assert mount["Source"] in host.binds()
        assert await caller.shell("old", "cat /s/name") == "sub"
        assert (await caller.revisions("old"))[-1].cause == container_revision_pb2.REVISION_CAUSE_RESTARTED
        await caller.delete_all()


async def stopped(daemon: Daemon) -> Daemon:
    """A daemon that has ended."""
    assert await asyncio.to_thread(daemon.stop) == 0
    return daemon
