"""ports.LayerStore: a writable layer is transferred to a successor; calls can be repeated, and an exchange undone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from gpudock_server.adapters.layers import OverlayLayerStore
from gpudock_server.errors import LayerCarryFailed
from gpudock_server.model.engine import EngineContainer, EngineImage
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.ports import LayerStore

from tests.contracts.two_containers import FakeContainers, OverlayContainers, TwoContainers, model_containers
from tests.rpc.fake_layers import FakeLayers
from tests.unit.model_files import ModelLayers


@dataclass
class Subject:
    """An implementation with two containers."""

    store: LayerStore
    containers: TwoContainers

    @property
    def source(self) -> EngineContainer:
        """The source, stopped."""
        return self.containers.source

    @property
    def target(self) -> EngineContainer:
        """A container that never ran."""
        return self.containers.target

    @property
    def files(self) -> tuple[frozenset[str], frozenset[str]]:
        """The files in the layers of source and target."""
        return self.containers.files(self.source), self.containers.files(self.target)


@pytest.fixture
def overlay_subject(tmp_path: Path) -> Subject:
    """Layers on this disk."""
    return Subject(OverlayLayerStore(None, str(tmp_path), local=True), OverlayContainers(tmp_path))


@pytest.fixture
async def model_subject() -> Subject:
    """The fake of saga tests."""
    containers = await model_containers()
    return Subject(ModelLayers(containers.engine), containers)


@pytest.fixture
def fake_subject() -> Subject:
    """The fake of RPC tests."""
    return Subject(FakeLayers(), FakeContainers())


@pytest.fixture(params=["fake", "model", "overlay"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each implementation."""
    made: Subject = request.getfixturevalue(f"{request.param}_subject")
    return made


@pytest.fixture
def store(subject: Subject) -> LayerStore:
    return subject.store


# Without files of images, both fakes also lack accounts, the progress of commits and refused commits
# (tests/engine/test_layers.py, test_image_accounts.py).
_NO_FILES = "FakeLayers moves nothing, and holds no files"
NOT_FAKED = {
    "fake": {
        "test_an_exchange_swaps_the_layers_once_and_back": _NO_FILES,
        "test_a_copied_layer_equals_its_source": _NO_FILES,
        "test_exchanged_layers_are_not_copied": _NO_FILES,
    }
}


NOTHING: frozenset[str] = frozenset()
FILE = frozenset({"file"})


def _no_progress(_current: int, _total: int) -> None:
    pass


async def test_each_method_is_available_or_has_a_reason(store: LayerStore) -> None:
    methods = dict(await store.methods())
    assert methods.keys() == set(LayerTransferMethod) - {LayerTransferMethod.NONE}


async def test_the_planned_method_is_available(store: LayerStore, subject: Subject) -> None:
    plan = await store.plan(subject.containers.running)
    assert dict(await store.methods())[plan.method] == ""
    assert plan.bytes_to_move >= 0
    assert plan.bytes_available >= plan.bytes_to_move


async def test_the_plan_of_a_commit(store: LayerStore, subject: Subject) -> None:
    plan = await store.commit_plan(subject.source)
    assert plan.method is LayerTransferMethod.COMMIT
    cost = await store.commit_cost(subject.source)
    if cost.measured:
        assert 0 <= cost.allocated_bytes <= cost.bytes_available
        assert cost.entries >= 0
    else:
        assert (cost.apparent_bytes, cost.allocated_bytes, cost.entries) == (0, 0, 0)
    await store.require_committable(subject.source)
    async with store.report_commit_progress(subject.source, 0, _no_progress):
        pass


async def test_an_image_without_readable_files_has_no_accounts(store: LayerStore) -> None:
    assert await store.accounts(EngineImage(id="sha256:1")) is None


async def test_locate_distinguishes_the_layers_and_moves_nothing(store: LayerStore, subject: Subject) -> None:
    subject.containers.write("file")
    before = subject.files
    pair = await store.locate(subject.containers.running, subject.target)
    assert pair == await store.locate(subject.source, subject.target)
    assert pair.old_path != pair.new_path
    assert pair.old_inode != pair.new_inode
    assert subject.files == before


async def test_locate_refuses_containers_of_different_images(store: LayerStore, subject: Subject) -> None:
    of_another_image = dataclasses.replace(subject.target, image_id=f"sha256:{2:064x}")
    for old, new in (
        (subject.source, subject.source),
        (subject.source, of_another_image),
        (of_another_image, subject.source),
    ):
        with pytest.raises(LayerCarryFailed):
            await store.locate(old, new)


async def test_an_exchange_swaps_the_layers_once_and_back(store: LayerStore, subject: Subject) -> None:
    subject.containers.write("file")
    pair = await store.locate(subject.source, subject.target)
    await store.exchange_back(pair)
    assert subject.files == (FILE, NOTHING), "an exchange back before the exchange moved files"
    for _ in range(2):
        assert await store.exchange(pair)
        assert subject.files == (NOTHING, FILE)
    for _ in range(2):
        await store.exchange_back(pair)
        assert subject.files == (FILE, NOTHING)


async def test_a_copied_layer_equals_its_source(store: LayerStore, subject: Subject) -> None:
    subject.containers.write("first")
    pair = await store.locate(subject.source, subject.target)
    for written in ("first", "second"):
        subject.containers.write(written)
        reports: list[tuple[int, int]] = []
        await store.copy(pair, lambda now, total, into=reports: into.append((now, total)))  # type: ignore[misc]  # bound in this iteration
        assert subject.files[0] == subject.files[1]
        assert written in subject.files[1]
        assert reports == sorted(reports)
        assert reports[-1][0] == reports[-1][1]


async def test_exchanged_layers_are_not_copied(store: LayerStore, subject: Subject) -> None:
    subject.containers.write("file")
    pair = await store.locate(subject.source, subject.target)
    assert await store.exchange(pair)
    with pytest.raises(LayerCarryFailed):
        await store.copy(pair, _no_progress)
    assert subject.files == (NOTHING, FILE), "the only copy of the files is lost"
