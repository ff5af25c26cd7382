"""AdoptVolume takes only volumes that the operator allows, and none that gives access to the host."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest_asyncio
from gpudock.v1 import container_pb2

from tests.calls import IMAGE, Caller, failure
from tests.engine.drift import state_of
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.rig import Rig

__all__ = ["daemons"]

CONSENT = {"gpudock.adopt": "true"}
NO_OPTIONS: Mapping[str, str] = {}


@pytest_asyncio.fixture
async def adopting_caller(daemons: IsolatedDaemons) -> AsyncIterator[Caller]:
    """A caller of a daemon whose setting `adoptable_volumes` allows names besides the label."""
    daemon = await daemons.start("--adoptable-volumes", "team-*,exact")
    async with Caller(daemon.target) as caller:
        yield caller
        await caller.delete_all()
    assert "Traceback" not in daemon.log_text, daemon.log_text


def create_engine_volume(
    rig: Rig, name: str, labels: Mapping[str, str] = CONSENT, options: Mapping[str, str] = NO_OPTIONS
) -> str:
    """Create a volume of the engine, like `docker volume create`; returns its name."""
    rig.engine.call("POST", "/volumes/create", send={"Name": name, "Labels": dict(labels), "DriverOpts": dict(options)})
    return name


@contextmanager
def foreign_container(
    rig: Rig, volume: str, labels: dict[str, str] | None = None, *, runs: bool = True
) -> Iterator[str]:
    """A container that gpudock did not create and that mounts a volume; yields its name."""
    mounts = [{"Type": "volume", "Source": volume, "Target": "/data"}]
    spec = {"Image": IMAGE, "Cmd": ["sleep", "3600"], "Labels": labels or {}, "HostConfig": {"Mounts": mounts}}
    name = f"user-{uuid.uuid4().hex[:8]}"
    rig.engine.call("POST", f"/containers/create?name={name}", send=spec)
    if runs:
        rig.engine.call("POST", f"/containers/{name}/start")
    try:
        yield name
    finally:
        rig.engine.call("DELETE", f"/containers/{name}?force=1")


def host_bound_options(folder: Path) -> dict[str, dict[str, str]]:
    """Options, by name, with which a volume is a part of the host."""
    return {
        "bind": {"type": "none", "o": "bind", "device": str(folder)},
        "rbind": {"type": "none", "o": "ro,rbind", "device": "/"},
        "disguised": {"type": "tmpfs", "o": "size=1m,bind", "device": str(folder)},
        "disk": {"type": "ext4", "device": "/dev/sda1"},
        "overlay": {"type": "overlay", "device": "overlay", "o": "lowerdir=/etc,upperdir=/tmp/u,workdir=/tmp/w"},
    }


async def test_a_part_of_the_host_is_never_adopted(adopting_caller: Caller, rig: Rig, tmp_path: Path) -> None:
    """The label does not allow it, and nor does the allow-list: the engine resolves the folder at every start."""
    (tmp_path / "key").write_text("secret")
    for name, options in host_bound_options(tmp_path).items():
        create_engine_volume(rig, name, options=options)
        for size in (0, 320 << 20):
            refused = await failure(adopting_caller.adopt_volume(name, size_bytes=size))
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ADOPTION_FORBIDDEN"), name
            assert options["device"] in refused.metadata["detail"]
        assert (await failure(adopting_caller.volume(name))).reason == "VOLUME_NOT_FOUND"


async def test_a_volume_of_memory_or_of_nfs_is_adopted(adopting_caller: Caller, rig: Rig) -> None:
    create_engine_volume(rig, "memory", options={"type": "tmpfs", "device": "tmpfs", "o": "size=1m"})
    create_engine_volume(rig, "files", options={"type": "nfs", "device": ":/export", "o": "addr=192.0.2.1"})
    for name in ("memory", "files"):
        assert (await adopting_caller.adopt_volume(name)).name == name


async def test_a_volume_that_the_operator_does_not_allow_seems_not_to_exist(adopting_caller: Caller, rig: Rig) -> None:
    for name in ("team-a", "exact"):
        create_engine_volume(rig, name, {})
        assert (await adopting_caller.adopt_volume(name)).name == name
    absent = await failure(adopting_caller.adopt_volume("new", "absent"))
    assert (absent.code, absent.reason) == (grpc.StatusCode.NOT_FOUND, "VOLUME_NOT_FOUND")
    for name, labels in (("pgdata", {}), ("exactly", {}), ("another", {"gpudock.adopt": "false"})):
        create_engine_volume(rig, name, labels)
        refused = await failure(adopting_caller.adopt_volume("new", name))
        assert refused.message == absent.message.replace("absent", name)
        assert refused.metadata == {"volume": name}
        # The error for a mount does not show that the volume exists either.
        unknown = await failure(
            adopting_caller.create("new", mounts=[container_pb2.Mount(volume=name, target="/data")])
        )
        assert "AdoptVolume" not in unknown.message


async def test_a_volume_in_use_by_another_container_is_refused(
    adopting_caller: Caller, daemons: IsolatedDaemons, rig: Rig
) -> None:
    create_engine_volume(rig, "pgdata")
    for runs in (True, False):
        with foreign_container(rig, "pgdata", runs=runs) as name:
            # A copy of its files is refused too, even if the container does not run.
            for size in (0, 320 << 20):
                refused = await failure(adopting_caller.adopt_volume("new", "pgdata", size))
                assert (refused.reason, refused.metadata["holders"]) == ("VOLUME_IN_USE", name)
                assert refused.metadata["engine_volume"] == "pgdata"
                assert "engine volume 'pgdata' is in use" in refused.message
    # Labels of gpudock on a container of another installation, or of an image that docker commit made of a container.
    labels = {"gpudock.uid": str(uuid.uuid4()), "gpudock.name": "other", "gpudock.operation": str(uuid.uuid4())}
    with foreign_container(rig, "pgdata", labels):
        assert (await failure(adopting_caller.adopt_volume("new", "pgdata"))).reason == "VOLUME_IN_USE"
    # A volume that another installation created has its labels; a volume that it adopted is in use.
    foreign_labels = {"gpudock.uid": str(uuid.uuid4()), "gpudock.name": "foreign", "gpudock.node": "other"}
    create_engine_volume(rig, "foreign", {**CONSENT, **foreign_labels})
    assert (await failure(adopting_caller.adopt_volume("new", "foreign"))).reason == "VOLUME_EXISTS"
    other = await daemons.start("--etcd-prefix", f"/other{daemons.prefix}", node=f"{daemons.node}-other")
    async with Caller(other.target) as caller:
        await caller.adopt_volume("foreign", "pgdata")
        await caller.create("user", mounts=[container_pb2.Mount(volume="foreign", target="/data")])
        assert (await failure(adopting_caller.adopt_volume("new", "pgdata"))).reason == "VOLUME_IN_USE"
        await caller.delete_all()


async def test_anonymous_volumes_are_refused(adopting_caller: Caller, rig: Rig) -> None:
    create_engine_volume(rig, "0123456789abcdef" * 4)
    create_engine_volume(rig, "named", {**CONSENT, "com.docker.volume.anonymous": ""})
    for name in ("0123456789abcdef" * 4, "named"):
        refused = await failure(adopting_caller.adopt_volume("new", name))
        assert (refused.reason, "anonymous" in refused.metadata["detail"]) == ("ADOPTION_FORBIDDEN", True)
        mounts = [container_pb2.Mount(volume=name, target="/data")]
        assert "adopt" not in (await failure(adopting_caller.create("new", mounts=mounts))).message


async def test_a_host_folder_that_an_older_version_adopted_is_not_mounted(
    adopting_caller: Caller, daemons: IsolatedDaemons, rig: Rig, tmp_path: Path
) -> None:
    """A container that already has the mount is not started either."""
    create_engine_volume(rig, "harmless")
    create_engine_volume(rig, "hazard", options=host_bound_options(tmp_path)["bind"])
    await adopting_caller.adopt_volume("old", "harmless")
    mounts = [container_pb2.Mount(volume="old", target="/data")]
    await adopting_caller.create("user", mounts=mounts)
    await adopting_caller.stop("user")
    async with state_of(daemons, rig) as state:
        key = state.keys.volume("old")
        await state.put(key, (await state.read(key)).replace(b'"harmless"', b'"hazard"'))
    for call in (adopting_caller.create("another", mounts=mounts), adopting_caller.start("user")):
        refused = await failure(call)
        assert (refused.reason, refused.metadata["call"]) == ("VOLUME_FAILED", "mount")
        assert f"it is a bind mount of host path '{tmp_path}'" in refused.metadata["detail"]
