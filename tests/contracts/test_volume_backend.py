"""ports.VolumeBackend: stores with a size, and stores without one; each call twice, and what is refused.

ProjectQuotaBackend needs a kernel with project quotas: tests/engine/test_volume_quotas.py, in the test VM.
"""

# These tests have no other tasks that blocking calls could delay.
# ruff: noqa: ASYNC240, PTH208
from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from gpudock_server.adapters.volumes import LoopBackend, PlainBackend
from gpudock_server.errors import SizeNotSupported, VolumeFailed, VolumeInUse, VolumeTooSmallForData
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking, VolumeIdentity
from gpudock_server.ports import ShrinkNeedsCopy, VolumeBackend

from tests.engine.loop_devices import loop_devices_below
from tests.rpc.fake_volumes import FakePlainVolumes, FakeVolumes
from tests.selection import deep_except
from tests.unit.faults import Faults
from tests.unit.model_files import ModelPlainVolumes, ModelVolumes

MIB = 1 << 20
SIZE, LARGER, SMALLER = 320 * MIB, 400 * MIB, 300 * MIB


@dataclass
class Sized:
    """An implementation for volumes with a size, and a size that it refuses."""

    backend: VolumeBackend
    unsupported: int = 1 * MIB

    async def made(self, name: str = "data", size_bytes: int = SIZE) -> VolumeBacking:
        """A new store."""
        return await self.backend.create(str(uuid.uuid4()), name, size_bytes)


@pytest.fixture
async def loop_sized(tmp_path: Path) -> AsyncIterator[Sized]:
    """Loop devices with the best filesystem of this host."""
    backend = LoopBackend(tmp_path / "volumes", local=True)
    if reason := await backend.unavailable_reason():
        pytest.skip(reason)
    yield Sized(backend)
    for found in await backend.backings_on_disk():
        if found.backing:
            await backend.destroy(found.backing)
    assert not loop_devices_below(tmp_path), "a loop device is still attached"


@pytest.fixture
def fake_sized() -> Sized:
    """The fake of RPC tests."""
    return Sized(FakeVolumes(), FakeVolumes.UNSUPPORTED)


@pytest.fixture
def model_sized() -> Sized:
    """The fake of saga tests."""
    return Sized(ModelVolumes(faults=Faults()), FakeVolumes.UNSUPPORTED)


FAKES = ("fake", "model")
IMPLEMENTATIONS = (*FAKES, "loop")
# For tests that take seconds on loop devices: those run with the deep tests, and the fakes every day.
LOOP_IS_DEEP = pytest.mark.parametrize("sized", deep_except(FAKES, IMPLEMENTATIONS), indirect=True)


@pytest.fixture(params=IMPLEMENTATIONS)
def sized(request: pytest.FixtureRequest) -> Sized:
    """Each implementation."""
    made: Sized = request.getfixturevalue(f"{request.param}_sized")
    return made


_NO_FILES = "the fakes hold no files: a test says what is in use"
NOT_FAKED = {
    "fake": {"test_files_are_kept_by_resizes": _NO_FILES},
    "model": {"test_files_are_kept_by_resizes": _NO_FILES},
}


@pytest.fixture
def backend(sized: Sized) -> VolumeBackend:
    return sized.backend


async def test_a_backend_is_available_and_has_its_kind(backend: VolumeBackend) -> None:
    assert await backend.unavailable_reason() == ""
    assert backend.kind is not VolumeBackendKind.PLAIN


async def test_a_store_is_made_once(backend: VolumeBackend) -> None:
    uid = str(uuid.uuid4())
    made = await backend.create(uid, "data", SIZE)
    assert await backend.create(uid, "data", SIZE) == made
    assert (made.kind, made.uid, made.name, made.size_bytes) == (backend.kind, uid, "data", SIZE)
    assert made.engine_volume
    usage = await backend.usage(made)
    assert usage.size_bytes >= SIZE
    assert 0 <= usage.used_bytes <= usage.minimum_bytes <= SIZE


async def test_unsupported_sizes_are_refused(sized: Sized, backend: VolumeBackend) -> None:
    with pytest.raises(SizeNotSupported):
        await sized.made(size_bytes=sized.unsupported)
    made = await sized.made()
    with pytest.raises(SizeNotSupported):
        await backend.replacement(made, str(uuid.uuid4()), sized.unsupported)
    assert [one.uid for one in await backend.backings_on_disk()] == [made.uid], "a refused store was left"


async def test_stores_on_disk_are_listed_with_their_identity(sized: Sized, backend: VolumeBackend) -> None:
    assert await backend.backings_on_disk() == ()
    identity = VolumeIdentity(node="n1", owner="alice", labels={"team": "x"})
    made = await backend.create(str(uuid.uuid4()), "data", SIZE, identity)
    other = await sized.made("other")
    found = {one.uid: one for one in await backend.backings_on_disk()}
    assert {uid: one.backing for uid, one in found.items()} == {made.uid: made, other.uid: other}
    assert (found[made.uid].identity, found[other.uid].identity) == (identity, None)
    grown = await backend.grow(made, LARGER)
    await backend.destroy(other)
    (left,) = await backend.backings_on_disk()
    assert (left.backing, left.identity, left.damage) == (grown, identity, "")


async def test_a_store_can_be_attached_at_any_time(sized: Sized, backend: VolumeBackend) -> None:
    made = await sized.made()
    for _ in range(2):
        await backend.attach(made)
    assert (await backend.usage(made)).size_bytes >= SIZE


async def test_a_store_grows(sized: Sized, backend: VolumeBackend) -> None:
    made = await sized.made()
    grown = await backend.grow(made, LARGER)
    assert grown == made.model_copy(update={"size_bytes": LARGER})
    # A repeated call succeeds.
    assert await backend.grow(made, LARGER) == await backend.grow(grown, LARGER) == grown
    assert (await backend.usage(grown)).size_bytes >= LARGER


async def test_a_store_shrinks_or_needs_a_copy(sized: Sized, backend: VolumeBackend) -> None:
    made = await sized.made()
    if backend.needs_copy(made, SMALLER):
        with pytest.raises(ShrinkNeedsCopy):
            await backend.shrink(made, SMALLER)
        assert (await backend.usage(made)).size_bytes >= SIZE, "the store was changed"
    else:
        shrunk = await backend.shrink(made, SMALLER)
        assert shrunk == made.model_copy(update={"size_bytes": SMALLER})
        assert await backend.shrink(shrunk, SMALLER) == shrunk


async def test_a_shrink_below_the_bytes_in_use_changes_nothing(sized: Sized, backend: VolumeBackend) -> None:
    made = await sized.made()
    with pytest.raises(VolumeTooSmallForData) as refused:
        await backend.shrink(made, 1)
    assert refused.value.requested_bytes == 1
    assert refused.value.used_bytes <= refused.value.minimum_bytes <= SIZE
    assert (await backend.usage(made)).size_bytes >= SIZE


@LOOP_IS_DEEP
async def test_two_stores_exchange_their_contents(sized: Sized, backend: VolumeBackend) -> None:
    old = await sized.made(size_bytes=LARGER)
    uid = str(uuid.uuid4())
    new = await backend.replacement(old, uid, SIZE)
    assert await backend.replacement(old, uid, SIZE) == new
    assert (new.uid, new.size_bytes, new.kind) == (uid, SIZE, old.kind)
    content, other_content = await backend.content(old), await backend.content(new)
    assert content != other_content
    # The state after the exchange: the sizes are exchanged with the contents.
    small, large = old.model_copy(update={"size_bytes": SIZE}), new.model_copy(update={"size_bytes": LARGER})
    for holder in (old, new):
        async with backend.open_files(holder):
            with pytest.raises(VolumeInUse):
                await backend.exchange(large, small, content)
        assert await backend.content(old) == content, "the store was changed"
    for _ in range(2):
        await backend.exchange(large, small, content)
        assert (await backend.content(new), await backend.content(old)) == (content, other_content)
    assert SIZE <= (await backend.usage(small)).size_bytes < LARGER
    assert {one.uid: one.backing for one in await backend.backings_on_disk()} == {small.uid: small, large.uid: large}
    for _ in range(2):
        await backend.exchange(old, new, content)
        assert (await backend.content(old), await backend.content(new)) == (content, other_content)
    with pytest.raises(VolumeFailed):
        await backend.exchange(old, new, "what neither holds")
    # Its kind and its uid are sufficient.
    await backend.destroy(VolumeBacking(kind=new.kind, uid=new.uid, name="", engine_volume=""))
    assert [one.uid for one in await backend.backings_on_disk()] == [old.uid]


@LOOP_IS_DEEP
async def test_an_open_store_is_not_destroyed(sized: Sized, backend: VolumeBackend) -> None:
    made = await sized.made()
    async with backend.open_files(made), backend.open_files(made):
        with pytest.raises(VolumeInUse):
            await backend.destroy(made)
        assert (await backend.usage(made)).size_bytes >= SIZE
    for _ in range(2):
        await backend.destroy(made)
    assert await backend.backings_on_disk() == ()


async def test_files_are_kept_by_resizes(sized: Sized, backend: VolumeBackend) -> None:
    made = await sized.made()
    async with backend.open_files(made) as folder:
        assert os.listdir(folder) == [], "a new store has files"
        Path(folder, "file").write_text("kept")
    made = await backend.grow(made, LARGER)
    async with backend.open_files(made) as folder:
        assert Path(folder, "file").read_text() == "kept"


async def test_a_destroyed_store_is_removed(sized: Sized, backend: VolumeBackend) -> None:
    made = await sized.made()
    await backend.destroy(made)
    for call in (backend.usage(made), backend.attach(made), backend.content(made), backend.grow(made, LARGER)):
        with pytest.raises(VolumeFailed):
            await call
    with pytest.raises(VolumeFailed):
        async with backend.open_files(made):
            pass
    assert await backend.backings_on_disk() == ()


async def test_the_pool_counts_the_sizes_of_stores(sized: Sized, backend: VolumeBackend) -> None:
    one, other = await sized.made("one"), await sized.made("other", LARGER)
    pool = await backend.pool()
    assert pool.promised_bytes == SIZE + LARGER
    assert 0 < pool.free_bytes <= pool.total_bytes
    assert pool.allocated_bytes >= 0
    for made in (one, other):
        await backend.destroy(made)
    assert (await backend.pool()).promised_bytes == 0


# ---- without a size ----


@pytest.fixture(params=["fake", "model", "engine"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> VolumeBackend:
    """Each implementation for volumes without a size."""
    made: dict[str, VolumeBackend] = {
        "fake": FakePlainVolumes(),
        "model": ModelPlainVolumes(faults=Faults()),
        "engine": PlainBackend(tmp_path),
    }
    return made[request.param]


async def test_plain_stores_have_no_size(plain: VolumeBackend) -> None:
    assert plain.kind is VolumeBackendKind.PLAIN
    assert await plain.unavailable_reason() == ""
    with pytest.raises(SizeNotSupported):
        await plain.create(str(uuid.uuid4()), "data", SIZE)
    uid = str(uuid.uuid4())
    made = await plain.create(uid, "data", 0)
    assert await plain.create(uid, "data", 0) == made
    assert (made.kind, made.uid, made.name, made.size_bytes) == (VolumeBackendKind.PLAIN, uid, "data", 0)
    for change in (plain.grow, plain.shrink):
        with pytest.raises(SizeNotSupported):
            await change(made, SIZE)
    await plain.attach(made)
    assert (await plain.pool()).promised_bytes == 0


async def test_plain_stores_exist_only_in_the_engine(plain: VolumeBackend) -> None:
    made = await plain.create(str(uuid.uuid4()), "data", 0)
    assert await plain.backings_on_disk() == (), "a plain store is listed"
    assert not plain.needs_copy(made, 0)
    for call in (
        plain.replacement(made, str(uuid.uuid4()), 0),
        plain.content(made),
        plain.exchange(made, made, "content"),
    ):
        with pytest.raises(VolumeFailed):
            await call
    for _ in range(2):
        await plain.destroy(made)
