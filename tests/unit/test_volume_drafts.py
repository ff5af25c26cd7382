"""What is refused before anything is done to a volume, what a plan says, and what is read of volumes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from gpudock_server.core.containers.commands import Pause, Stop
from gpudock_server.core.volumes.adoption_rules import AdoptionRules
from gpudock_server.core.volumes.backends import choose_backend
from gpudock_server.core.volumes.commands import Adopt, Command, Create, Delete, Resize
from gpudock_server.errors import (
    EngineRejected,
    EngineVolumeInUse,
    EngineVolumeNotFound,
    GpudockError,
    PoolFull,
    SizeNotSupported,
    VolumeFailed,
    VolumeMounted,
    VolumeMountedByRunning,
    VolumeNotAdopted,
    VolumeRecordLost,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import EngineState, EngineVolume
from gpudock_server.model.operation import Operation, OperationState
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.volume import (
    PoolUsage,
    VolumeBackendKind,
    VolumeBacking,
    VolumeCause,
    VolumeState,
    VolumeUsage,
)
from gpudock_server.ports import Versioned

from tests.unit.desk import NODE, SPEC, Desk
from tests.unit.model_files import ModelPlain, ModelVolumes
from tests.unit.scenarios import MIB, MOUNTING, foreign_volume
from tests.unit.scripted import UnsteadyStore, daemon

TIB = 1 << 40
USED = 1 << 20


@pytest.fixture
async def desk() -> Desk:
    """A node with a volume of 64 MiB."""
    made = Desk(store=UnsteadyStore())
    await made.must(Create("data", size_bytes=64 * MIB, owner="o", labels={"k": "v"}))
    return made


async def refusal(desk: Desk, command: Command) -> GpudockError:
    """What is said of what is refused; nothing of it has been done."""
    before = desk.picture()
    with pytest.raises(GpudockError) as refused:
        await desk.start(command)
    assert desk.picture() == before
    return refused.value


async def preview(desk: Desk, command: Command) -> Operation:
    """What would be done; nothing is."""
    before = desk.picture()
    operation = await desk.volumes.preview(command)
    assert desk.picture() == before
    assert (operation.state, operation.node) == (OperationState.PLANNED, NODE)
    return operation


def change_head(desk: Desk, **changes: object) -> None:
    """Have something else recorded of the volume."""
    head = desk.store.volume_heads["data"]
    desk.store.volume_heads["data"] = Versioned(head.value.changed(**changes), head.version)


async def test_the_record_of_a_volume(desk: Desk) -> None:
    head = desk.volume()
    assert (head.name, head.node, head.owner, head.labels) == ("data", NODE, "o", {"k": "v"})
    assert (head.generation, head.revision, head.state) == (1, 1, VolumeState.READY)
    assert head.backing is not None
    assert (head.backing.kind, head.backing.uid) == (VolumeBackendKind.LOOP, head.uid)
    assert head.backing.folder == head.mountpoint == f"/engine/{head.backing.engine_volume}"
    assert desk.sized.identities == {head.uid: head.identity}
    (revision,) = desk.store.volume_past.values()
    assert (revision.volume, revision.uid, revision.revision) == ("data", head.uid, 1)
    assert (revision.size_bytes, revision.cause) == (64 * MIB, VolumeCause.CREATED)
    assert revision.operation_id in desk.store.journal
    labels = desk.engine.volumes[head.backing.engine_volume].labels
    assert labels["gpudock.uid"] == head.uid
    assert labels["gpudock.node"] == NODE
    assert '"owner":"o"' in labels["gpudock.volume"]
    for size, cause in ((96 * MIB, VolumeCause.GROWN), (32 * MIB, VolumeCause.SHRUNK)):
        before = desk.volume()
        operation = await desk.must(Resize("data", size))
        head = desk.volume()
        assert operation.result == head
        assert head.update_time > before.update_time
        assert head.revision == before.revision + 1
        assert head.generation == before.generation + 1
        revision = desk.store.volume_past[head.uid, head.revision]
        assert (revision.size_bytes, revision.cause) == (size, cause)


@pytest.mark.parametrize("command", [Resize("data", 32 * MIB), Delete("data"), Delete("data", force=True)])
async def test_what_is_not_there_or_not_as_it_was_seen(desk: Desk, command: Any) -> None:
    unknown = await refusal(desk, replace(command, name="date"))
    assert (unknown.reason, unknown.metadata) == ("VOLUME_NOT_FOUND", {"volume": "date", "available": "data"})
    stale = await refusal(desk, replace(command, etag="old"))
    assert stale.metadata == {"volume": "data", "etag": "old", "current_etag": desk.volume().etag}
    desk.store.locks[ResourceKind.VOLUME, "data"] = "other"
    busy = await refusal(desk, replace(command, etag=desk.volume().etag))
    assert (busy.reason, busy.metadata) == ("VOLUME_BUSY", {"volume": "data", "operation_id": "other"})
    desk.store.locks.clear()
    change_head(desk, node="far")
    assert isinstance(desk.store, UnsteadyStore)
    desk.store.daemons = [daemon("near", "n:1"), daemon("far", "f:1")]
    elsewhere = await refusal(desk, command)
    assert elsewhere.metadata == {"volume": "data", "node": "far", "address": "f:1"}


async def test_a_volume_that_the_engine_has_may_be_adopted_under_its_name(desk: Desk) -> None:
    await foreign_volume(desk)
    assert isinstance(await refusal(desk, Resize("theirs", MIB)), VolumeNotAdopted)
    desk.engine.volumes["theirs"] = EngineVolume(name="theirs", driver="local")
    assert not isinstance(await refusal(desk, Resize("theirs", MIB)), VolumeNotAdopted)


async def test_a_volume_is_made_once(desk: Desk) -> None:
    for command in (Create("data"), Adopt("data", "theirs")):
        exists = await refusal(desk, command)
        assert (exists.reason, exists.metadata["volume"]) == ("VOLUME_EXISTS", "data")
    backing = desk.volume().backing
    assert backing is not None
    del desk.store.volume_heads["data"]
    lost = await refusal(desk, Create("data"))
    assert isinstance(lost, VolumeRecordLost)
    assert (lost.volume, lost.engine_volume) == ("data", backing.engine_volume)


@pytest.mark.parametrize(
    ("size_bytes", "forced", "sized", "chosen"),
    [
        (0, None, "", VolumeBackendKind.PLAIN),
        (1, None, "", VolumeBackendKind.LOOP),
        (1, VolumeBackendKind.LOOP, "", VolumeBackendKind.LOOP),
        (0, VolumeBackendKind.PLAIN, "no loop devices", VolumeBackendKind.PLAIN),
        (0, VolumeBackendKind.LOOP, "", "LOOP: requires a size; PLAIN: available, but not requested"),
        (1, VolumeBackendKind.PLAIN, "", "LOOP: available, but not requested; PLAIN: does not support a size"),
        (1, None, "no loop devices", "LOOP: no loop devices; PLAIN: does not support a size"),
        (1, VolumeBackendKind.PROJECT_QUOTA, "no", "LOOP: no; PLAIN: does not support a size"),
    ],
)
async def test_which_backend_a_volume_is_made_on(
    size_bytes: int, forced: VolumeBackendKind | None, sized: str, chosen: VolumeBackendKind | str
) -> None:
    loop = ModelVolumes()

    async def unavailable_reason() -> str:
        return sized

    loop.unavailable_reason = unavailable_reason  # type: ignore[method-assign]  # this call alone differs
    asked = choose_backend([loop, ModelPlain()], name="data", size_bytes=size_bytes, forced=forced)
    if isinstance(chosen, VolumeBackendKind):
        assert (await asked).kind is chosen
        return
    with pytest.raises(SizeNotSupported) as refused:
        await asked
    assert refused.value.metadata == {"volume": "data", "size_bytes": str(size_bytes), "detail": chosen}


async def test_the_setting_chooses_for_volumes_with_a_size_and_the_caller_for_all(desk: Desk) -> None:
    desk.configure(forced_backend=VolumeBackendKind.PROJECT_QUOTA)
    refused = await refusal(desk, Create("b", size_bytes=MIB))
    assert (refused.reason, refused.metadata["volume"]) == ("SIZE_NOT_SUPPORTED", "b")
    await preview(desk, Create("b", size_bytes=MIB, backend=VolumeBackendKind.LOOP))
    await preview(desk, Create("b"))


async def test_what_the_pool_can_be_promised(desk: Desk) -> None:
    usage = PoolUsage(total_bytes=100 * MIB, free_bytes=60 * MIB, promised_bytes=64 * MIB, allocated_bytes=10 * MIB)

    async def pool() -> PoolUsage:
        return usage

    desk.sized.pool = pool  # type: ignore[method-assign]  # this call alone differs
    # 60 and 10 MiB, of which 64 are promised.
    await preview(desk, Create("b", size_bytes=6 * MIB))
    full = await refusal(desk, Create("b", size_bytes=6 * MIB + 1))
    assert isinstance(full, PoolFull)
    assert full.metadata == {
        "path": "/volumes",
        "needed_bytes": str(6 * MIB + 1),
        "available_bytes": str(6 * MIB),
    }
    # It has what it has already.
    await preview(desk, Resize("data", 70 * MIB))
    assert (await refusal(desk, Resize("data", 70 * MIB + 1))).metadata["available_bytes"] == str(70 * MIB)
    await preview(desk, Create("b"))
    change_head(desk, reserved_bytes=80 * MIB)
    assert (await refusal(desk, Create("b", size_bytes=1))).metadata["available_bytes"] == "0"
    # What is promised on another node is no matter of this one.
    change_head(desk, node="far")
    await preview(desk, Create("b", size_bytes=70 * MIB))
    over = replace(desk.core.backends, overcommit=2.0)
    await over.require_space(VolumeBackendKind.LOOP, "b", 140 * MIB)
    with pytest.raises(PoolFull):
        await over.require_space(VolumeBackendKind.LOOP, "b", 140 * MIB + 1)


async def test_which_pool_there_is(desk: Desk) -> None:
    assert await desk.core.backends.pool_usage() == await desk.sized.pool()

    async def unavailable_reason() -> str:
        return "no loop devices"

    desk.sized.unavailable_reason = unavailable_reason  # type: ignore[method-assign]  # this call alone differs
    assert await desk.core.backends.pool_usage() is None
    assert await replace(desk.core.backends, backends=[desk.plain]).pool_usage() is None
    assert desk.core.backends.of_kind(VolumeBackendKind.PLAIN) is desk.plain


async def test_what_cannot_be_resized(desk: Desk) -> None:
    small = await refusal(desk, Resize("data", 2 * USED - 1))
    assert small.metadata == {
        "volume": "data",
        "requested_bytes": str(2 * USED - 1),
        "used_bytes": str(USED),
        "minimum_bytes": str(2 * USED),
    }
    await preview(desk, Resize("data", 2 * USED))
    assert (await preview(desk, Resize("data", 64 * MIB))).stages[0].name == "commit"
    change_head(desk, state=VolumeState.DELETING)
    failed = await refusal(desk, Resize("data", 32 * MIB))
    assert isinstance(failed, VolumeFailed)
    assert failed.call == "resize"
    change_head(desk, state=VolumeState.READY, backing=None)
    assert (await refusal(desk, Resize("data", 32 * MIB))).metadata == {
        "volume": "data",
        "holders": "the operation that creates it",
    }
    await desk.must(Create("plain"))
    plain = await refusal(desk, Resize("plain", MIB))
    assert plain.metadata["detail"].startswith("PLAIN volumes have no size")


async def test_who_stands_against_a_shrink_by_a_copy(desk: Desk) -> None:
    desk.sized.copies = True
    plan = (await preview(desk, Resize("data", 32 * MIB))).plan
    assert (plan.bytes_to_move, plan.bytes_available, plan.restarts_process) == (USED, 8 * TIB, False)
    await desk.made(spec=MOUNTING)
    operation = await preview(desk, Resize("data", 32 * MIB))
    assert operation.plan.restarts_process
    assert [stage.name for stage in operation.stages] == [
        *("make", "copy", "stop", "difference", "locate", "exchange", "start", "verify", "commit", "retire")
    ]
    done = await desk.must(Resize("data", 32 * MIB))
    assert done.locks == (desk.head().target,), "nobody changes it meanwhile"
    await desk.must(Resize("data", 64 * MIB))
    await desk.must(Pause("a"))
    paused = await refusal(desk, Resize("data", 32 * MIB))
    assert (paused.reason, paused.metadata) == ("CONTAINER_PAUSED", {"container": "a"})
    await desk.must(Stop("a"))
    assert "stop" not in [stage.name for stage in (await preview(desk, Resize("data", 32 * MIB))).stages]
    stranger = replace(desk.seen(), id="stranger", name="theirs")
    desk.engine.containers["stranger"] = stranger
    desk.engine.layer_of["stranger"] = desk.engine.layer_of[desk.engine_id()]
    await preview(desk, Resize("data", 32 * MIB))
    desk.engine.containers["stranger"] = replace(stranger, state=type(stranger.state).RUNNING)
    used = await refusal(desk, Resize("data", 32 * MIB))
    assert (used.reason, used.metadata) == ("VOLUME_IN_USE", {"volume": "data", "holders": "theirs"})


async def test_a_store_that_does_not_shrink_after_all_says_so(desk: Desk) -> None:
    before = desk.picture()
    desk.sized.copies = True
    desk.sized.needs_copy = lambda backing, size_bytes: False  # type: ignore[method-assign]  # noqa: ARG005 - the names are the protocol's
    operation = await desk.do(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.metadata == {"volume": "data", "call": "shrink", "detail": "it cannot shrink in place"}
    assert desk.picture() == before


async def test_another_volume_of_the_name_is_none_of_an_operations(desk: Desk) -> None:
    grow = desk.sized.grow

    async def meanwhile(backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        change_head(desk, uid="1b4e28ba-2fa1-41d2-883f-0016d3cca427")
        return await grow(backing, size_bytes)

    desk.sized.grow = meanwhile  # type: ignore[method-assign]  # this call alone differs
    operation = await desk.do(Resize("data", 96 * MIB))
    assert (operation.state, operation.committed) == (OperationState.RUNNING, False)
    assert desk.volume().size_bytes == 64 * MIB


async def test_a_container_that_does_not_bear_the_smaller_volume_gets_the_old_one_back(desk: Desk) -> None:
    desk.sized.copies = True
    await desk.made(spec=MOUNTING)
    before = desk.picture()
    start = desk.engine.start

    async def dies_with_the_smaller(engine_id: str) -> None:
        (size, _), *_rest = desk.sized.stores.values()
        desk.engine.ends = 7 if size == 32 * MIB else None
        await start(engine_id)

    desk.engine.start = dies_with_the_smaller  # type: ignore[method-assign]  # this call alone differs
    operation = await desk.do(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.reason == "START_FAILED"
    assert operation.error.metadata["container"] == "a"
    assert "exited with code 7" in operation.error.metadata["detail"]
    assert desk.picture() == before


async def test_a_failed_shrink_leaves_its_containers_as_the_engine_shows_them(desk: Desk) -> None:
    desk.sized.copies = True
    await desk.made("a", MOUNTING)
    await desk.made("b", MOUNTING)
    await desk.must(Stop("a"))
    # Made by a process that was killed before it had an engine container.
    del desk.engine.containers[desk.engine_id("a")]
    desk.store.put(desk.head().changed(engine=None))
    before, ended = desk.head(), desk.engine_id("b")

    async def ends_meanwhile(*_: object, **__: object) -> None:
        desk.engine.containers[ended] = replace(desk.engine.containers[ended], state=EngineState.EXITED, exit_code=7)
        raise VolumeFailed(volume="data", call="copy", detail="no")

    desk.copier.copy = ends_meanwhile  # type: ignore[method-assign]  # this call alone differs
    operation = await desk.do(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.metadata == {"volume": "data", "call": "copy", "detail": "no"}
    assert (desk.head("b").status.state, desk.head("b").status.exit_code) == (ContainerState.EXITED, 7)
    assert desk.head() == before


async def test_a_container_that_was_started_with_the_smaller_volume_is_killed_before_it_gets_the_old_one(
    desk: Desk,
) -> None:
    desk.sized.copies = True
    await desk.made(spec=MOUNTING)
    before = desk.picture()
    desk.engine.stopped_within.clear()

    async def refused(_engine_id: str, _seconds: float) -> int | None:
        raise EngineRejected(call="wait", status=500, detail="no")

    desk.engine.exited_within = refused  # type: ignore[method-assign, assignment]
    operation = await desk.do(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.reason == "ENGINE_REJECTED"
    # Nothing that it has written since is kept, so it is given no time.
    assert desk.engine.stopped_within == [10, 0]
    assert desk.picture() == before


async def test_a_volume_whose_making_was_broken_off_is_deleted(desk: Desk) -> None:
    change_head(desk, state=VolumeState.DELETING, backing=None)
    for force in (False, True):
        assert (await preview(desk, Delete("data", force=force))).plan.warnings == ()
    await desk.must(Delete("data", force=True))
    assert not desk.store.volume_heads


async def test_who_stands_against_a_deletion(desk: Desk) -> None:
    await desk.made(spec=MOUNTING)
    mounted = await refusal(desk, Delete("data"))
    assert isinstance(mounted, VolumeMounted)
    assert mounted.metadata == {"volume": "data", "holders": "a"}
    running = await refusal(desk, Delete("data", force=True))
    assert isinstance(running, VolumeMountedByRunning)
    assert running.metadata == {"volume": "data", "holders": "a"}
    await desk.must(Stop("a"))
    plan = (await preview(desk, Delete("data", force=True))).plan
    assert plan.warnings[0] == "container a: new revision without volume data"
    assert (plan.bytes_to_move, plan.bytes_available) == (12, 50)
    stranger = replace(desk.seen(), id="stranger", name="theirs")
    desk.engine.containers["stranger"] = stranger
    desk.engine.layer_of["stranger"] = desk.engine.layer_of[desk.engine_id()]
    used = await refusal(desk, Delete("data", force=True))
    assert (used.reason, used.metadata) == ("VOLUME_IN_USE", {"volume": "data", "holders": "theirs"})
    await desk.made("b", SPEC)
    desk.store.put(desk.head().changed(spec=SPEC))
    used = await refusal(desk, Delete("data"))
    assert used.metadata["holders"].split(",")[-1] == "theirs"


async def test_what_may_be_adopted(desk: Desk) -> None:
    await foreign_volume(desk)
    theirs = desk.engine.volumes["theirs"]

    async def refused(**changes: object) -> GpudockError:
        desk.engine.volumes["theirs"] = theirs.model_copy(update=changes)
        return await refusal(desk, Adopt("new", "theirs"))

    unlabelled = await refused(labels={})
    assert isinstance(unlabelled, EngineVolumeNotFound)
    # What is there is not told from what is not.
    assert unlabelled.metadata == {"volume": "theirs", "available": ""}
    assert isinstance(await refusal(desk, Adopt("new", "nothing")), EngineVolumeNotFound)
    taken = await refused(labels={"gpudock.adopt": "true", "gpudock.uid": "x"})
    assert (taken.reason, taken.metadata["volume"]) == ("VOLUME_EXISTS", "theirs")
    backing = desk.volume().backing
    assert backing is not None
    ours = await refusal(desk, Adopt("new", backing.engine_volume))
    assert (ours.reason, ours.metadata["volume"]) == ("VOLUME_EXISTS", "data")
    anonymous = await refused(anonymous=True)
    assert anonymous.reason == "ADOPTION_FORBIDDEN"
    assert anonymous.metadata["engine_volume"] == "theirs"
    assert anonymous.metadata["volume"] == "new"
    assert (await refused(hazard="it mounts /")).metadata["detail"].startswith("it mounts /;")
    desk.engine.volumes["theirs"] = theirs.model_copy(update={"labels": {}})
    desk.configure(adoption=AdoptionRules(names=("the*",)))
    await desk.must(Adopt("new", "theirs"))
    (cause,) = [one.cause for one in desk.store.volume_past.values() if one.volume == "new"]
    assert cause is VolumeCause.ADOPTED


async def test_what_is_used_is_not_adopted(desk: Desk) -> None:
    await foreign_volume(desk)
    await desk.made(spec=SPEC)
    stranger = replace(desk.seen(), id="stranger", name="somebody", volumes={"/x": "theirs"})
    desk.engine.containers["stranger"] = stranger
    desk.engine.layer_of["stranger"] = desk.engine.layer_of[desk.engine_id()]
    for command in (Adopt("new", "theirs"), Adopt("new", "theirs", size_bytes=64 * MIB)):
        used = await refusal(desk, command)
        assert isinstance(used, EngineVolumeInUse)
        assert used.metadata == {"volume": "new", "engine_volume": "theirs", "holders": "somebody"}
    desk.engine.containers["stranger"] = replace(stranger, state=type(stranger.state).EXITED)
    for command in (Adopt("new", "theirs"), Adopt("new", "theirs", size_bytes=64 * MIB)):
        assert isinstance(await refusal(desk, command), EngineVolumeInUse)
    # One of ours, whose volume lost its record: its files are copied while it does not run.
    mine = replace(desk.seen(), volumes={"/x": "theirs"})
    del desk.engine.containers["stranger"]
    desk.engine.containers[mine.id] = mine
    assert isinstance(await refusal(desk, Adopt("new", "theirs", size_bytes=64 * MIB)), EngineVolumeInUse)
    desk.engine.containers[mine.id] = replace(mine, state=type(mine.state).EXITED)
    plan = (await preview(desk, Adopt("new", "theirs", size_bytes=64 * MIB))).plan
    assert (plan.bytes_to_move, plan.bytes_available) == (USED, 8 * TIB)
    small = await refusal(desk, Adopt("new", "theirs", size_bytes=USED - 1))
    assert small.metadata["detail"] == "engine volume theirs has 1 MiB of files"
    await preview(desk, Adopt("new", "theirs", size_bytes=USED))
    theirs = desk.engine.volumes["theirs"]
    for changes in ({"driver": "nfs"}, {"options": {"type": "nfs"}}):
        desk.engine.volumes["theirs"] = theirs.model_copy(update=changes)
        failed = await refusal(desk, Adopt("new", "theirs", size_bytes=64 * MIB))
        assert isinstance(failed, VolumeFailed)
        assert (failed.volume, failed.call) == ("new", "copy")


async def test_what_is_read_of_volumes(desk: Desk) -> None:
    await desk.must(Create("plain"))
    await desk.made(spec=MOUNTING)
    seen = await desk.volumes.get("data")
    assert (seen.view.volume, seen.containers, seen.used_bytes) == (desk.volume(), ("a",), USED)
    page = await desk.volumes.list(page_size=10, page_token="")
    assert [(one.view.volume.name, one.containers, one.used_bytes) for one in page.items] == [
        ("data", ("a",), USED),
        ("plain", (), None),
    ]
    assert (await desk.volumes.get("plain")).used_bytes == USED
    first = await desk.volumes.list(page_size=1, page_token="")
    second = await desk.volumes.list(page_size=1, page_token=first.next_token)
    assert [one.view.volume.name for one in (*first.items, *second.items)] == ["data", "plain"]
    assert first.watch_token
    history = await desk.volumes.revisions("data", page_size=5, page_token="")
    assert [one.revision for one in history.items] == [1]
    for call in (desk.volumes.get("date"), desk.volumes.revisions("date", page_size=1, page_token="")):
        with pytest.raises(GpudockError) as unknown:
            await call
        assert unknown.value.metadata == {"volume": "date", "available": "data,plain"}
    change_head(desk, node="far")
    assert (await desk.volumes.get("data")).used_bytes is None
    change_head(desk, node=NODE, state=VolumeState.DELETING)
    assert (await desk.volumes.get("data")).used_bytes is None
    change_head(desk, state=VolumeState.READY)

    async def failing(_: object) -> VolumeUsage:
        raise VolumeFailed(volume="data", call="look", detail="no")

    desk.sized.usage = failing  # type: ignore[method-assign, assignment]
    assert (await desk.volumes.get("data")).used_bytes is None


async def test_volumes_are_looked_into_a_few_at_a_time(desk: Desk) -> None:
    for number in range(8):
        await desk.must(Create(f"v{number}", size_bytes=MIB))
    at_once, most = 0, 0

    async def counted(_: object) -> VolumeUsage:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return VolumeUsage(used_bytes=1, size_bytes=2, minimum_bytes=1)

    desk.sized.usage = counted  # type: ignore[method-assign, assignment]
    page = await desk.volumes.list(page_size=10, page_token="")
    assert {one.used_bytes for one in page.items} == {1}
    assert most == 4


async def test_what_an_operation_on_a_volume_leaves(desk: Desk) -> None:
    seen = await desk.volumes.run(Resize("data", 96 * MIB), None)
    assert seen.view.volume == desk.volume()
    await desk.volumes.run_to_end(Delete("data"), None)
    assert not desk.store.volume_heads
