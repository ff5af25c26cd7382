"""`kill -9` at moments of operations on volumes: afterwards the volume is complete, or does not exist.

The volume backend is the best that the machine has: project quotas in the VM (tests/vm), mostly loop devices elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import grpc
import pytest
from gpudock.v1 import container_pb2, node_service_pb2, operation_pb2, operation_service_pb2, volume_pb2
from gpudock_server.model.operation import OperationKind

from tests.calls import Caller
from tests.engine.loop_devices import detach_loop_devices, loop_devices_below
from tests.engine.volume_containers import volume_container
from tests.faults.daemon_killer import DaemonKiller, KillScenario
from tests.faults.volume_pools import filesystem_size, mount_of
from tests.rig import Rig
from tests.vm.machine import FILESYSTEM_VARIABLE

_MIB = 1 << 20
_SIZE = 320 * _MIB
_WRITE_FILES = (
    "dd if=/dev/urandom of=/data/blob bs=64k count=16 2>/dev/null; ln /data/blob /data/link; chmod 4751 /data/blob"
)
_SHOW_FILES = "cd /data && md5sum blob link && stat -c '%a %h %u %Y' blob"


@pytest.fixture
def volumes_rig(clean_engine: Rig) -> Iterator[Rig]:
    """The rig; loop devices of volumes of killed daemons are detached after the test."""
    yield clean_engine
    clean_engine.engine.remove_all()
    detach_loop_devices(clean_engine.folder)


async def _volume_or_none(caller: Caller) -> volume_pb2.Volume | None:
    try:
        return await caller.volume("subject")
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017 - any other code fails the test
        return None


async def _require_nothing_left(caller: Caller, rig: Rig) -> None:
    assert not loop_devices_below(rig.folder)
    node = (await caller.nodes.GetNode(node_service_pb2.GetNodeRequest())).node
    assert not node.volume_pool.promised_bytes, "the volume pool has unreleased bytes"
    left = rig.engine.call("GET", "/volumes")["Volumes"] or []
    assert not [volume["Name"] for volume in left if volume["Name"].startswith("gpudock-")]


async def _require_ready(caller: Caller, rig: Rig, *sizes: int) -> volume_pb2.Volume:
    """Assert that the volume `subject` is READY, with one of these sizes and at most one loop device."""
    volume = await _volume_or_none(caller)
    assert volume is not None
    assert volume.state == volume_pb2.VOLUME_STATE_READY
    assert volume.size_bytes in sizes
    assert not volume.operation_id
    assert len(loop_devices_below(rig.folder)) <= 1
    if FILESYSTEM_VARIABLE in os.environ:
        assert volume.backend == volume_pb2.VOLUME_BACKEND_PROJECT_QUOTA
    return volume


def _create(rig: Rig) -> KillScenario:
    async def create(caller: Caller) -> None:
        await caller.create_volume("subject", _SIZE)

    async def check(caller: Caller) -> None:
        if await _volume_or_none(caller) is not None:
            await _require_ready(caller, rig, _SIZE)
            await caller.delete_volume("subject")
        await _require_nothing_left(caller, rig)

    return KillScenario("CREATE_VOLUME", create, check)


def _delete(rig: Rig) -> KillScenario:
    async def delete(caller: Caller) -> None:
        if await _volume_or_none(caller) is None:
            await caller.create_volume("subject", _SIZE)
        await caller.delete_volume("subject")

    async def check(caller: Caller) -> None:
        if await _volume_or_none(caller) is None:
            await _require_nothing_left(caller, rig)
        else:
            await _require_ready(caller, rig, _SIZE)

    return KillScenario("DELETE_VOLUME", delete, check)


def _delete_with_force(rig: Rig) -> KillScenario:
    """Delete a volume of two stopped containers, which are updated first; their other files stay."""
    kept = ""

    async def delete(caller: Caller) -> None:
        nonlocal kept
        if not kept:
            for name in ("subject", "second"):
                await caller.create(name)
                await caller.shell(name, _WRITE_FILES.replace("/data", "/root"))
            kept = await caller.shell("subject", _SHOW_FILES.replace("/data", "/root"))
        if await _volume_or_none(caller) is None:
            await caller.create_volume("subject", _SIZE)
        for name in ("subject", "second"):
            if not (await caller.get(name)).spec.mounts:
                await caller.update(name, mounts=[mount_of("subject")])
            await caller.stop(name)
        await caller.delete_volume("subject", force=True)

    async def check(caller: Caller) -> None:
        volume = await _volume_or_none(caller)
        if volume is None:
            await _require_nothing_left(caller, rig)
        else:
            await _require_ready(caller, rig, _SIZE)
        listed = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest())
        failed = [
            operation for operation in listed.operations if operation.state != operation_pb2.OPERATION_STATE_SUCCEEDED
        ]
        assert not [operation.error for operation in failed], "an operation that has begun must be completed"
        for name in ("subject", "second"):
            container = await caller.get(name)
            assert not container.status.operation_id
            assert container.spec.mounts == ([mount_of("subject")] if volume is not None else [])
            await caller.start(name)
        assert await caller.shell("subject", _SHOW_FILES.replace("/data", "/root")) == kept

    return KillScenario("DELETE_VOLUME", delete, check)


def _adopt(rig: Rig) -> KillScenario:
    """Adopt an engine volume with a size, by a copy; the engine volume is unchanged."""
    files = ""

    async def adopt(caller: Caller) -> None:
        nonlocal files
        if not files:
            rig.engine.call("POST", "/volumes/create", send={"Name": "theirs", "Labels": {"gpudock.adopt": "true"}})
            with volume_container(rig, "theirs") as theirs:
                theirs.run("sh", "-c", _WRITE_FILES)
                files = theirs.run("sh", "-c", _SHOW_FILES).stdout
        await caller.adopt_volume("subject", "theirs", _SIZE)

    async def check(caller: Caller) -> None:
        if await _volume_or_none(caller) is not None:
            await _require_ready(caller, rig, _SIZE)
            await caller.create("subject", mounts=[mount_of("subject")])
            assert await caller.shell("subject", _SHOW_FILES) == files
            await caller.delete("subject")
            await caller.delete_volume("subject")
        await _require_nothing_left(caller, rig)
        with volume_container(rig, "theirs") as theirs:
            assert theirs.run("sh", "-c", _SHOW_FILES).stdout == files

    return KillScenario("ADOPT_VOLUME", adopt, check)


def _resize_in_place(rig: Rig, *, step: int) -> KillScenario:
    """Change the size by one step each time; after the last step begin with a new volume."""
    files, sizes = "", range(2 * _SIZE, 2 * _SIZE + 33 * step, step)

    async def resize(caller: Caller) -> None:
        nonlocal files
        volume = await _volume_or_none(caller)
        if volume is not None and volume.size_bytes == sizes[-1]:
            await caller.delete("subject")
            await caller.delete_volume("subject")
            volume = None
        if volume is None:
            volume = await caller.create_volume("subject", 2 * _SIZE)
            await caller.create("subject", mounts=[mount_of("subject")])
            await caller.shell("subject", _WRITE_FILES)
            files = await caller.shell("subject", _SHOW_FILES)
        await caller.resize_volume("subject", volume.size_bytes + step)

    async def check(caller: Caller) -> None:
        volume = await _require_ready(caller, rig, *sizes)
        assert abs(await filesystem_size(caller, "subject") - volume.size_bytes) < volume.size_bytes // 50
        assert await caller.shell("subject", _SHOW_FILES) == files

    # Of the filesystems for loop devices, only btrfs can grow and shrink in place.
    return KillScenario("RESIZE_VOLUME", resize, check, ("--volume-filesystem", "btrfs"))


def _shrink_by_copy(rig: Rig) -> KillScenario:
    files = ""

    async def shrink(caller: Caller) -> None:
        nonlocal files
        await caller.create_volume("subject", _SIZE + 64 * _MIB)
        await caller.create("subject", mounts=[mount_of("subject")])
        await caller.shell("subject", _WRITE_FILES)
        files = await caller.shell("subject", _SHOW_FILES)
        await caller.resize_volume("subject", _SIZE)

    async def check(caller: Caller) -> None:
        volume = await _require_ready(caller, rig, _SIZE, _SIZE + 64 * _MIB)
        assert (await caller.get("subject")).status.state == container_pb2.CONTAINER_STATE_RUNNING
        assert abs(await filesystem_size(caller, "subject") - volume.size_bytes) < volume.size_bytes // 50
        assert await caller.shell("subject", _SHOW_FILES) == files
        await caller.delete("subject")
        await caller.delete_volume("subject")
        await _require_nothing_left(caller, rig)

    flags = ("--volume-backend", "loop", "--volume-filesystem", "xfs")
    return KillScenario("RESIZE_VOLUME", shrink, check, flags)


_SCENARIOS: dict[str, Callable[[Rig], KillScenario]] = {
    "create": _create,
    "delete": _delete,
    "delete-with-force": _delete_with_force,
    "adopt": _adopt,
    "grow": partial(_resize_in_place, step=4 * _MIB),
    "shrink": partial(_resize_in_place, step=-4 * _MIB),
    "shrink-by-copy": _shrink_by_copy,
}
# Operations that can be undone; the others cannot be cancelled and have one step.
_UNDONE = ("create", "adopt", "shrink-by-copy")
_ONE_OF_EACH_KIND = ("create", "delete", "grow", "adopt")


@pytest.mark.parametrize("scenario", _ONE_OF_EACH_KIND)
async def test_one_moment(volumes_rig: Rig, daemon_killer: DaemonKiller, scenario: str) -> None:
    await daemon_killer.kill_at_one_moment(_SCENARIOS[scenario](volumes_rig))


@pytest.mark.deep
async def test_create(volumes_rig: Rig, daemon_killer: DaemonKiller) -> None:
    await daemon_killer.kill_at_every_moment(_create(volumes_rig))


@pytest.mark.deep
async def test_delete(volumes_rig: Rig, daemon_killer: DaemonKiller) -> None:
    await daemon_killer.kill_at_every_moment(_delete(volumes_rig))


@pytest.mark.deep
@pytest.mark.parametrize("step", [pytest.param(4 * _MIB, id="grow"), pytest.param(-4 * _MIB, id="shrink")])
async def test_resize_in_place(volumes_rig: Rig, daemon_killer: DaemonKiller, step: int) -> None:
    await daemon_killer.kill_at_every_moment(_resize_in_place(volumes_rig, step=step))


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", ["delete-with-force", "adopt", "shrink-by-copy"])
async def test_every_moment(volumes_rig: Rig, daemon_killer: DaemonKiller, scenario: str) -> None:
    await daemon_killer.kill_at_every_moment(_SCENARIOS[scenario](volumes_rig))


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", _UNDONE)
async def test_while_undoing(volumes_rig: Rig, daemon_killer: DaemonKiller, scenario: str) -> None:
    await daemon_killer.kill_while_undoing(_SCENARIOS[scenario](volumes_rig))


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", _SCENARIOS)
async def test_while_recovering(volumes_rig: Rig, daemon_killer: DaemonKiller, scenario: str) -> None:
    await daemon_killer.kill_while_recovering(_SCENARIOS[scenario](volumes_rig))


def test_every_kind_of_operation_on_volumes_is_killed(rig: Rig) -> None:
    kinds = {kind.value for kind in OperationKind if kind.value.endswith("_VOLUME")}
    assert {make(rig).kind for make in _SCENARIOS.values()} == kinds
    assert sorted(_SCENARIOS[scenario](rig).kind for scenario in _ONE_OF_EACH_KIND) == sorted(kinds)
