"""Which volumes of the engine can be adopted: those that their operator names, and no way to the rest of the host."""

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
NONE: Mapping[str, str] = {}


@pytest_asyncio.fixture
async def tenant(daemons: IsolatedDaemons) -> AsyncIterator[Caller]:
    """Calls a daemon whose operator allows names besides the label."""
    daemon = await daemons.start("--adoptable-volumes", "team-*,exact")
    async with Caller(daemon.target) as caller:
        yield caller
        await caller.delete_all()
    # The engine keeps what cannot be mounted as well.
    assert "Traceback" not in daemon.log_text, daemon.log_text


def made(rig: Rig, name: str, labels: Mapping[str, str] = CONSENT, options: Mapping[str, str] = NONE) -> str:
    """`docker volume create`."""
    rig.engine.call("POST", "/volumes/create", send={"Name": name, "Labels": dict(labels), "DriverOpts": dict(options)})
    return name


@contextmanager
def user(rig: Rig, volume: str, labels: dict[str, str] | None = None, *, runs: bool = True) -> Iterator[str]:
    """A container of somebody else's that mounts a volume."""
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


def hazards(folder: Path) -> dict[str, dict[str, str]]:
    """Options that make a volume a part of the host."""
    return {
        "bind": {"type": "none", "o": "bind", "device": str(folder)},
        "rbind": {"type": "none", "o": "ro,rbind", "device": "/"},
        "disguised": {"type": "tmpfs", "o": "size=1m,bind", "device": str(folder)},
        "disk": {"type": "ext4", "device": "/dev/sda1"},
        "overlay": {"type": "overlay", "device": "overlay", "o": "lowerdir=/etc,upperdir=/tmp/u,workdir=/tmp/w"},
    }


async def test_a_part_of_the_host_is_never_adopted(tenant: Caller, rig: Rig, tmp_path: Path) -> None:
    """Neither with the operator's label nor, as the engine resolves the folder at every start, below the allow-list."""
    (tmp_path / "key").write_text("secret")
    for name, options in hazards(tmp_path).items():
        made(rig, name, options=options)
        for size in (0, 320 << 20):
            refused = await failure(tenant.adopt_volume(name, size_bytes=size))
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ADOPTION_FORBIDDEN"), name
            assert options["device"] in refused.metadata["detail"]
        assert (await failure(tenant.volume(name))).reason == "VOLUME_NOT_FOUND"


async def test_what_is_not_of_the_host_is_adopted(tenant: Caller, rig: Rig) -> None:
    made(rig, "memory", options={"type": "tmpfs", "device": "tmpfs", "o": "size=1m"})
    made(rig, "files", options={"type": "nfs", "device": ":/export", "o": "addr=192.0.2.1"})
    for name in ("memory", "files"):
        assert (await tenant.adopt_volume(name)).name == name


async def test_only_what_the_operator_names_and_all_else_as_if_it_were_not_there(tenant: Caller, rig: Rig) -> None:
    for name in ("team-a", "exact"):
        made(rig, name, {})
        assert (await tenant.adopt_volume(name)).name == name
    absent = await failure(tenant.adopt_volume("mine", "absent"))
    assert (absent.code, absent.reason) == (grpc.StatusCode.NOT_FOUND, "VOLUME_NOT_FOUND")
    for name, labels in (("pgdata", {}), ("exactly", {}), ("another", {"gpudock.adopt": "false"})):
        made(rig, name, labels)
        answer = await failure(tenant.adopt_volume("mine", name))
        assert answer.message == absent.message.replace("absent", name)
        assert answer.metadata == {"volume": name}
        # Nor does a mount tell.
        unknown = await failure(tenant.create("mine", mounts=[container_pb2.Mount(volume=name, target="/data")]))
        assert "AdoptVolume" not in unknown.message


async def test_what_others_use_is_refused(tenant: Caller, daemons: IsolatedDaemons, rig: Rig) -> None:
    made(rig, "pgdata")
    for runs in (True, False):
        with user(rig, "pgdata", runs=runs) as name:
            # Nor is a copy made of its files, though a container that does not run has it.
            for size in (0, 320 << 20):
                refused = await failure(tenant.adopt_volume("mine", "pgdata", size))
                assert (refused.reason, refused.metadata["holders"]) == ("VOLUME_IN_USE", name)
                assert refused.metadata["engine_volume"] == "pgdata"
                assert "engine volume 'pgdata' is in use" in refused.message
    # A container that says it is one of gpudock's: another installation's, or of an image that was committed from one.
    labels = {"gpudock.uid": str(uuid.uuid4()), "gpudock.name": "other", "gpudock.operation": str(uuid.uuid4())}
    with user(rig, "pgdata", labels):
        assert (await failure(tenant.adopt_volume("mine", "pgdata"))).reason == "VOLUME_IN_USE"
    # What another installation made says so itself; what it adopted is in use.
    theirs = {"gpudock.uid": str(uuid.uuid4()), "gpudock.name": "theirs", "gpudock.node": "other"}
    made(rig, "theirs", {**CONSENT, **theirs})
    assert (await failure(tenant.adopt_volume("mine", "theirs"))).reason == "VOLUME_EXISTS"
    other = await daemons.start("--etcd-prefix", f"/other{daemons.prefix}", node=f"{daemons.node}-other")
    async with Caller(other.target) as caller:
        await caller.adopt_volume("theirs", "pgdata")
        await caller.create("user", mounts=[container_pb2.Mount(volume="theirs", target="/data")])
        assert (await failure(tenant.adopt_volume("mine", "pgdata"))).reason == "VOLUME_IN_USE"
        await caller.delete_all()


async def test_anonymous_volumes_are_refused(tenant: Caller, rig: Rig) -> None:
    made(rig, "0123456789abcdef" * 4)
    made(rig, "named", {**CONSENT, "com.docker.volume.anonymous": ""})
    for name in ("0123456789abcdef" * 4, "named"):
        refused = await failure(tenant.adopt_volume("mine", name))
        assert (refused.reason, "anonymous" in refused.metadata["detail"]) == ("ADOPTION_FORBIDDEN", True)
        mounts = [container_pb2.Mount(volume=name, target="/data")]
        assert "adopt" not in (await failure(tenant.create("mine", mounts=mounts))).message


async def test_what_an_older_version_let_be_adopted_is_not_mounted(
    tenant: Caller, daemons: IsolatedDaemons, rig: Rig, tmp_path: Path
) -> None:
    """Nor is a container that has it started again."""
    made(rig, "harmless")
    made(rig, "hazard", options=hazards(tmp_path)["bind"])
    await tenant.adopt_volume("old", "harmless")
    mounts = [container_pb2.Mount(volume="old", target="/data")]
    await tenant.create("user", mounts=mounts)
    await tenant.stop("user")
    async with state_of(daemons, rig) as state:
        key = state.keys.volume("old")
        await state.put(key, (await state.read(key)).replace(b'"harmless"', b'"hazard"'))
    for call in (tenant.create("another", mounts=mounts), tenant.start("user")):
        refused = await failure(call)
        assert (refused.reason, refused.metadata["call"]) == ("VOLUME_FAILED", "mount")
        assert f"it is a bind mount of host path '{tmp_path}'" in refused.metadata["detail"]
