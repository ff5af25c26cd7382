"""What operations on a volume leave, and what is read of volumes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from gpudock_server.core.containers.commands import Stop
from gpudock_server.core.volumes.commands import Create, Delete, Resize
from gpudock_server.errors import (
    EngineRejected,
    GpudockError,
    VolumeFailed,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import EngineState
from gpudock_server.model.operation import OperationState
from gpudock_server.model.volume import (
    VolumeBackendKind,
    VolumeBacking,
    VolumeCause,
    VolumeState,
    VolumeUsage,
)

from tests.unit.drafts import preview
from tests.unit.model_node import NODE, ModelNode
from tests.unit.scenario_setups import MIB, SPEC_WITH_DATA
from tests.unit.volume_examples import USED, change_record


@pytest.fixture
def model(model_with_volume: ModelNode) -> ModelNode:
    """A node with volume `data`."""
    return model_with_volume


async def test_the_record_and_the_revisions_of_a_volume(model: ModelNode) -> None:
    volume = model.volume()
    assert (volume.name, volume.node, volume.owner, volume.labels) == ("data", NODE, "o", {"k": "v"})
    assert (volume.generation, volume.revision, volume.state) == (1, 1, VolumeState.READY)
    assert volume.backing is not None
    assert (volume.backing.kind, volume.backing.uid) == (VolumeBackendKind.LOOP, volume.uid)
    assert volume.backing.folder == volume.mountpoint == f"/engine/{volume.backing.engine_volume}"
    assert model.sized_volumes.identities == {volume.uid: volume.identity}
    (revision,) = model.store.volume_revision_records.values()
    assert (revision.volume, revision.uid, revision.revision) == ("data", volume.uid, 1)
    assert (revision.size_bytes, revision.cause) == (64 * MIB, VolumeCause.CREATED)
    assert revision.operation_id in model.store.journal
    labels = model.engine.volumes[volume.backing.engine_volume].labels
    assert labels["gpudock.uid"] == volume.uid
    assert labels["gpudock.node"] == NODE
    assert '"owner":"o"' in labels["gpudock.volume"]
    for size, cause in ((96 * MIB, VolumeCause.GROWN), (32 * MIB, VolumeCause.SHRUNK)):
        before = model.volume()
        operation = await model.run_ok(Resize("data", size))
        volume = model.volume()
        assert operation.result == volume
        assert volume.update_time > before.update_time
        assert volume.revision == before.revision + 1
        assert volume.generation == before.generation + 1
        revision = model.store.volume_revision_records[volume.uid, volume.revision]
        assert (revision.size_bytes, revision.cause) == (size, cause)


async def test_a_backend_that_cannot_shrink_in_place_fails_the_resize(model: ModelNode) -> None:
    before = model.summary()
    model.sized_volumes.copies = True
    model.sized_volumes.needs_copy = lambda backing, size_bytes: False  # type: ignore[method-assign]  # noqa: ARG005 - the names are those of the protocol
    operation = await model.run(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.metadata == {"volume": "data", "call": "shrink", "detail": "it cannot shrink in place"}
    assert model.summary() == before


async def test_a_resize_does_not_change_a_new_volume_of_the_same_name(model: ModelNode) -> None:
    grow = model.sized_volumes.grow

    async def replace_volume_and_grow(backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        change_record(model, uid="1b4e28ba-2fa1-41d2-883f-0016d3cca427")
        return await grow(backing, size_bytes)

    model.sized_volumes.grow = replace_volume_and_grow  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Resize("data", 96 * MIB))
    assert (operation.state, operation.committed) == (OperationState.RUNNING, False)
    assert model.volume().size_bytes == 64 * MIB


async def test_a_container_that_fails_with_the_smaller_volume_gets_the_old_one(model: ModelNode) -> None:
    model.sized_volumes.copies = True
    await model.create_container(spec=SPEC_WITH_DATA)
    before = model.summary()
    start = model.engine.start

    async def exit_with_smaller_volume(engine_id: str) -> None:
        (size, _), *_rest = model.sized_volumes.stores.values()
        model.engine.exit_code_at_start = 7 if size == 32 * MIB else None
        await start(engine_id)

    model.engine.start = exit_with_smaller_volume  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.reason == "START_FAILED"
    assert operation.error.metadata["container"] == "a"
    assert "exited with code 7" in operation.error.metadata["detail"]
    assert model.summary() == before


async def test_a_failed_shrink_records_the_state_of_its_containers(model: ModelNode) -> None:
    model.sized_volumes.copies = True
    await model.create_container("a", SPEC_WITH_DATA)
    await model.create_container("b", SPEC_WITH_DATA)
    await model.run_ok(Stop("a"))
    # As a daemon leaves it that was killed before it created the engine container.
    del model.engine.containers[model.engine_id("a")]
    model.store.put(model.container().changed(engine=None))
    before, exited = model.container(), model.engine_id("b")

    async def exit_and_fail(*_: object, **__: object) -> None:
        model.engine.containers[exited] = replace(
            model.engine.containers[exited], state=EngineState.EXITED, exit_code=7
        )
        raise VolumeFailed(volume="data", call="copy", detail="no")

    model.copier.copy = exit_and_fail  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.metadata == {"volume": "data", "call": "copy", "detail": "no"}
    assert (model.container("b").status.state, model.container("b").status.exit_code) == (ContainerState.EXITED, 7)
    assert model.container() == before


async def test_a_failed_shrink_kills_a_container_that_was_started_with_the_smaller_volume(
    model: ModelNode,
) -> None:
    model.sized_volumes.copies = True
    await model.create_container(spec=SPEC_WITH_DATA)
    before = model.summary()
    model.engine.stop_timeouts.clear()

    async def refused(_engine_id: str, _seconds: float) -> int | None:
        raise EngineRejected(call="wait", status=500, detail="no")

    model.engine.exited_within = refused  # type: ignore[method-assign, assignment]
    operation = await model.run(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.reason == "ENGINE_REJECTED"
    # What its process has written since is not kept, so the process gets no time to stop.
    assert model.engine.stop_timeouts == [10, 0]
    assert model.summary() == before


async def test_a_volume_whose_creation_was_interrupted_can_be_deleted(model: ModelNode) -> None:
    change_record(model, state=VolumeState.DELETING, backing=None)
    for force in (False, True):
        assert (await preview(model, Delete("data", force=force))).plan.warnings == ()
    await model.run_ok(Delete("data", force=True))
    assert not model.store.volume_records


async def test_volumes_are_read_with_their_containers_and_usage(model: ModelNode) -> None:
    await model.run_ok(Create("plain"))
    await model.create_container(spec=SPEC_WITH_DATA)
    details = await model.volumes.get("data")
    assert (details.view.volume, details.containers, details.used_bytes) == (model.volume(), ("a",), USED)
    page = await model.volumes.list(page_size=10, page_token="")
    assert [(details.view.volume.name, details.containers, details.used_bytes) for details in page.items] == [
        ("data", ("a",), USED),
        ("plain", (), None),
    ]
    assert (await model.volumes.get("plain")).used_bytes == USED
    first = await model.volumes.list(page_size=1, page_token="")
    second = await model.volumes.list(page_size=1, page_token=first.next_token)
    assert [details.view.volume.name for details in (*first.items, *second.items)] == ["data", "plain"]
    assert first.watch_token
    history = await model.volumes.revisions("data", page_size=5, page_token="")
    assert [revision.revision for revision in history.items] == [1]
    for call in (model.volumes.get("date"), model.volumes.revisions("date", page_size=1, page_token="")):
        with pytest.raises(GpudockError) as unknown:
            await call
        assert unknown.value.metadata == {"volume": "date", "available": "data,plain"}
    change_record(model, node="far")
    assert (await model.volumes.get("data")).used_bytes is None
    change_record(model, node=NODE, state=VolumeState.DELETING)
    assert (await model.volumes.get("data")).used_bytes is None
    change_record(model, state=VolumeState.READY)

    async def failing(_: object) -> VolumeUsage:
        raise VolumeFailed(volume="data", call="usage", detail="no")

    model.sized_volumes.usage = failing  # type: ignore[method-assign, assignment]
    assert (await model.volumes.get("data")).used_bytes is None


async def test_the_usage_of_at_most_four_volumes_is_read_at_a_time(model: ModelNode) -> None:
    for number in range(8):
        await model.run_ok(Create(f"v{number}", size_bytes=MIB))
    current, maximum = 0, 0

    async def counted(_: object) -> VolumeUsage:
        nonlocal current, maximum
        current += 1
        maximum = max(maximum, current)
        await asyncio.sleep(0)
        current -= 1
        return VolumeUsage(used_bytes=1, size_bytes=2, minimum_bytes=1)

    model.sized_volumes.usage = counted  # type: ignore[method-assign, assignment]
    page = await model.volumes.list(page_size=10, page_token="")
    assert {details.used_bytes for details in page.items} == {1}
    assert maximum == 4


async def test_a_command_returns_the_volume_and_a_deletion_returns_nothing(model: ModelNode) -> None:
    details = await model.volumes.run(Resize("data", 96 * MIB), None)
    assert details.view.volume == model.volume()
    await model.volumes.run_to_end(Delete("data"), None)
    assert not model.store.volume_records
