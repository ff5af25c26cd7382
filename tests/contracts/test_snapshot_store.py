"""ports.SnapshotStore: the steps of a snapshot can be repeated; a sealed snapshot never changes."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from gpudock_server.adapters.host.trees.limits import Limits
from gpudock_server.adapters.layers import OverlaySnapshotStore
from gpudock_server.errors import SnapshotFailed
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import new_operation_id
from gpudock_server.model.snapshot import SnapshotKey, SnapshotKind
from gpudock_server.ports import LayerTooLarge, SnapshotStore

from tests.contracts.two_containers import FakeContainers, OverlayContainers, TwoContainers, model_containers
from tests.rpc.fake_layers import FakeSnapshots
from tests.unit.model_files import ModelSnapshots

UID = str(uuid.UUID(int=7))


def _key(revision: int) -> SnapshotKey:
    return SnapshotKey(uid=UID, revision=revision)


def _no_progress(_current: int, _total: int) -> None:
    pass


@dataclass
class Subject:
    """An implementation with two containers. For the store `too_large` the source has too many files."""

    store: SnapshotStore
    containers: TwoContainers
    too_large: Callable[[], SnapshotStore]

    @property
    def source(self) -> EngineContainer:
        """The source, stopped."""
        return self.containers.source

    @property
    def running(self) -> EngineContainer:
        """The source, running."""
        return self.containers.running

    @property
    def target(self) -> EngineContainer:
        """A container that never ran."""
        return self.containers.target

    def write(self, name: str) -> None:
        """Write a file in the source."""
        self.containers.write(name)

    def files(self, container: EngineContainer) -> frozenset[str]:
        """Return the files in the layer of a container."""
        return self.containers.files(container)


@pytest.fixture
async def overlay_subject(tmp_path: Path) -> AsyncIterator[Subject]:
    """Snapshot trees on this disk."""
    (tmp_path / "gpudock").mkdir()

    def store(limits: Limits) -> OverlaySnapshotStore:
        return OverlaySnapshotStore(str(tmp_path / "gpudock/snapshots"), str(tmp_path), local=True, limits=limits)

    whole, limited = store(Limits()), store(Limits(entries=1))
    yield Subject(whole, OverlayContainers(tmp_path), lambda: limited)
    for snapshots in (whole, limited):
        await snapshots.close()


@pytest.fixture
async def model_subject() -> Subject:
    """The fake of saga tests."""
    containers = await model_containers()
    store = ModelSnapshots(containers.engine)

    def too_large() -> SnapshotStore:
        store.failures = {name: LayerTooLarge("too many files") for name in ("gather", "complete")}
        return store

    return Subject(store, containers, too_large)


@pytest.fixture
def fake_subject() -> Subject:
    """The fake of RPC tests."""
    store = FakeSnapshots()
    return Subject(store, FakeContainers(), lambda: store)


@pytest.fixture(params=["fake", "model", "overlay"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each implementation."""
    made: Subject = request.getfixturevalue(f"{request.param}_subject")
    return made


@pytest.fixture
def store(subject: Subject) -> SnapshotStore:
    return subject.store


_NO_FILES = "FakeSnapshots holds no files"
NOT_FAKED = {
    "fake": {
        "test_a_snapshot_never_changes": _NO_FILES,
        "test_a_layer_is_mirrored_into_another": _NO_FILES,
        "test_a_layer_that_is_too_large_leaves_no_partial_snapshot": _NO_FILES,
    }
}


async def _make(subject: Subject, revision: int, previous: int = 0) -> str:
    """Seal a snapshot of the source; return the id of its operation."""
    operation_id, key = new_operation_id(), _key(revision)
    before = _key(previous) if previous else None
    await subject.store.gather(subject.running, key, operation_id, before, _no_progress)
    await subject.store.complete(subject.source, key, operation_id, before, _no_progress)
    await subject.store.seal(key, operation_id, subject.source.image_id)
    return operation_id


async def test_a_new_store_is_empty(store: SnapshotStore, subject: Subject) -> None:
    method, reason = await store.method(subject.running)
    assert method is not None
    assert reason == ""
    plan = await store.plan(subject.running, None)
    assert (plan.method, plan.too_large) == (method, "")
    assert plan.bytes_to_copy >= 0
    assert (await store.find(), await store.partials()) == ((), ())
    assert await store.sealed(_key(1)) is None


async def test_every_step_can_be_repeated(store: SnapshotStore, subject: Subject) -> None:
    subject.write("file")
    key, operation_id, image_id = _key(3), new_operation_id(), subject.source.image_id
    for _ in range(2):
        await store.gather(subject.running, key, operation_id, None, _no_progress)
    assert (await store.find(), await store.partials()) == ((), ((key, operation_id),))
    assert await store.sealed(key) is None
    with pytest.raises(SnapshotFailed, match="is incomplete"):
        await store.seal(key, operation_id, image_id)
    for _ in range(2):
        await store.complete(subject.source, key, operation_id, None, _no_progress)
    assert await store.partials() == ((key, operation_id),)
    sealed = await store.seal(key, operation_id, image_id)
    assert (sealed.kind, sealed.image_id) == (SnapshotKind.TREE, image_id)
    assert (await store.find(), await store.partials()) == ((key,), ())
    # The next daemon repeats all steps if this one is killed right after the seal.
    await store.gather(subject.running, key, operation_id, None, _no_progress)
    await store.complete(subject.source, key, operation_id, None, _no_progress)
    assert await store.seal(key, operation_id, image_id) == sealed
    assert await store.sealed(key) == sealed
    assert (await store.find(), await store.partials()) == ((key,), ())


async def test_gather_can_be_omitted(store: SnapshotStore, subject: Subject) -> None:
    operation_id = new_operation_id()
    await store.complete(subject.source, _key(1), operation_id, None, _no_progress)
    await store.seal(_key(1), operation_id, subject.source.image_id)
    assert await store.find() == (_key(1),)


async def test_a_snapshot_without_its_image_is_not_sealed(store: SnapshotStore, subject: Subject) -> None:
    operation_id = new_operation_id()
    await store.complete(subject.source, _key(1), operation_id, None, _no_progress)
    with pytest.raises(SnapshotFailed):
        await store.seal(_key(1), operation_id, "")
    assert await store.find() == ()


async def test_the_snapshot_of_another_operation_is_not_changed(store: SnapshotStore, subject: Subject) -> None:
    mine, key = await _make(subject, 1), _key(1)
    with pytest.raises(SnapshotFailed):
        await store.seal(key, new_operation_id(), subject.source.image_id)
    await store.discard(key, new_operation_id())
    assert await store.find() == (key,)
    for _ in range(2):
        await store.discard(key, mine)
    assert (await store.find(), await store.sealed(key)) == ((), None)
    partial, other = new_operation_id(), new_operation_id()
    for operation_id in (partial, other):
        await store.gather(subject.running, key, operation_id, None, _no_progress)
    await store.discard(key, partial)
    assert await store.partials() == ((key, other),)
    await store.discard(key, other)
    assert await store.partials() == ()


async def test_a_snapshot_without_its_record_is_replaced_by_a_new_one(store: SnapshotStore, subject: Subject) -> None:
    first, key = await _make(subject, 1), _key(1)
    subject.write("more")
    second = await _make(subject, 1, previous=1)
    await store.discard(key, first)
    assert await store.find() == (key,), "both snapshots are listed"
    await store.discard(key, second)
    assert await store.find() == ()


async def test_a_missing_previous_snapshot_is_no_error(store: SnapshotStore, subject: Subject) -> None:
    await _make(subject, 2, previous=1)
    assert await store.find() == (_key(2),)


async def test_a_snapshot_never_changes(store: SnapshotStore, subject: Subject) -> None:
    subject.write("first")
    await _make(subject, 1)
    subject.write("second")
    await _make(subject, 2, previous=1)
    assert sorted(key.revision for key in await store.find()) == [1, 2]
    await store.restore(_key(2), subject.target, _no_progress)
    assert subject.files(subject.target) == {"first", "second"}
    for _ in range(2):
        await store.restore(_key(1), subject.target, _no_progress)
        assert subject.files(subject.target) == {"first"}
    for _ in range(2):
        await store.remove(_key(1))
    assert await store.find() == (_key(2),)
    await store.restore(_key(2), subject.target, _no_progress)
    assert subject.files(subject.target) == {"first", "second"}, "a shared file was removed"


async def test_a_snapshot_is_restored_only_to_a_stopped_container_of_its_image(
    store: SnapshotStore, subject: Subject
) -> None:
    await _make(subject, 1)
    for key, target in (
        (_key(2), subject.target),
        (_key(1), dataclasses.replace(subject.target, image_id=f"sha256:{2:064x}")),
        (_key(1), dataclasses.replace(subject.target, state=EngineState.RUNNING)),
    ):
        with pytest.raises(SnapshotFailed):
            await store.restore(key, target, _no_progress)


async def test_a_layer_is_mirrored_into_another(store: SnapshotStore, subject: Subject) -> None:
    subject.write("first")
    operation_id = new_operation_id()
    for _ in range(2):
        await store.mirror(subject.running, subject.target, operation_id, still=False, progress=_no_progress)
    subject.write("second")
    for _ in range(2):
        await store.mirror(subject.source, subject.target, operation_id, still=True, progress=_no_progress)
        assert subject.files(subject.target) == {"first", "second"}


async def test_a_layer_is_mirrored_only_to_another_stopped_container_of_its_image(
    store: SnapshotStore, subject: Subject
) -> None:
    operation_id = new_operation_id()
    for source, target in (
        (subject.source, subject.source),
        (subject.source, dataclasses.replace(subject.target, image_id=f"sha256:{2:064x}")),
        (subject.source, dataclasses.replace(subject.target, state=EngineState.RUNNING)),
    ):
        with pytest.raises(SnapshotFailed):
            await store.mirror(source, target, operation_id, still=True, progress=_no_progress)


async def test_all_snapshots_of_one_container_are_removed(store: SnapshotStore, subject: Subject) -> None:
    await _make(subject, 1)
    await _make(subject, 2)
    await store.gather(subject.running, _key(3), new_operation_id(), None, _no_progress)
    other, operation_id = SnapshotKey(uid=str(uuid.UUID(int=8)), revision=1), new_operation_id()
    await store.complete(subject.source, other, operation_id, None, _no_progress)
    await store.seal(other, operation_id, subject.source.image_id)
    for _ in range(2):
        await store.remove_all(UID)
        assert (await store.find(), await store.partials()) == ((other,), ())


async def test_a_layer_that_is_too_large_leaves_no_partial_snapshot(store: SnapshotStore, subject: Subject) -> None:
    for name in ("a", "b", "c"):
        subject.write(name)
    operation_id = new_operation_id()
    await store.gather(subject.running, _key(1), operation_id, None, _no_progress)
    limited = subject.too_large()
    with pytest.raises(LayerTooLarge):
        await limited.complete(subject.source, _key(1), operation_id, None, _no_progress)
    assert await store.partials() == ()
    with pytest.raises(LayerTooLarge):
        await limited.gather(subject.running, _key(1), operation_id, None, _no_progress)
    assert await store.partials() == ()
