"""ResizeVolume at moments that are too short on a real filesystem: reservations and verification."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from gpudock.v1 import container_pb2
from gpudock.v1 import volume_service_pb2 as pb
from gpudock_server.errors import VolumeFailed
from gpudock_server.model.volume import PoolUsage, TreeSummary, VolumeBacking
from gpudock_server.ports import Progress
from typing_extensions import override

from tests.rig.patience import limit
from tests.rpc.fake_volumes import FakeCopier, FakeVolumes
from tests.rpc.in_memory_server import TIMEOUT_SECONDS, InMemoryServer, create_request, read_to_end, reason_of, serve
from tests.rpc.volume_calls import MIB, create_volume, error_reason, resize

TIB = 1 << 40


@dataclass(eq=False)
class GatedVolumes(FakeVolumes):
    """Volumes that wait for `may_grow` before they grow."""

    growing: asyncio.Event = field(default_factory=asyncio.Event)
    may_grow: asyncio.Event = field(default_factory=asyncio.Event)

    @override
    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        self.growing.set()
        await self.may_grow.wait()
        return await super().grow(backing, size_bytes)


async def test_a_resize_reserves_its_bytes_when_it_begins(tmp_path: Path) -> None:
    volumes = GatedVolumes()
    async with serve(tmp_path, volumes) as server:
        await create_volume(server)
        growing = asyncio.create_task(resize(server, 5 * TIB))
        async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
            await volumes.growing.wait()
        # The pool has 8 TiB: the second volume fits with the old size of the first volume, and not with its new size.
        second = pb.CreateVolumeRequest(name="second", size_bytes=4 * TIB)
        assert await error_reason(server.volumes.CreateVolume(second)) == "DISK_FULL"
        volumes.may_grow.set()
        _, error = await growing
        assert error is None
        await create_volume(server, "third", 3 * TIB - 64 * MIB)


@dataclass(eq=False)
class CopyingVolumes(FakeVolumes):
    """Volumes that shrink by a copy. `before_locks` runs after a draft has read which containers mount the volume."""

    before_locks: Callable[[], Awaitable[None]] | None = None
    replacements: set[str] = field(default_factory=set)
    exchanged: list[tuple[str, str]] = field(default_factory=list)

    @override
    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:
        return True

    @override
    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        self.replacements.add(uid)
        return backing.model_copy(update={"uid": uid, "size_bytes": size_bytes, "engine_volume": f"gpudock-{uid}"})

    @override
    async def content(self, backing: VolumeBacking) -> str:
        return "content"

    @override
    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        self.exchanged.append((holder.uid, other.uid))

    @override
    async def destroy(self, backing: VolumeBacking) -> None:
        self.replacements.discard(backing.uid)

    @override
    async def pool(self) -> PoolUsage:
        if self.before_locks is not None:
            hook, self.before_locks = self.before_locks, None
            await hook()
        return await super().pool()


@dataclass
class UnequalCopier(FakeCopier):
    """A copier whose first `unequal` verifications fail."""

    unequal: int
    copies: list[bool] = field(default_factory=list)

    @override
    async def copy(self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, final: bool) -> None:
        self.copies.append(final)

    @override
    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        if self.unequal:
            self.unequal -= 1
            raise VolumeFailed(volume=source.name, call="verify", detail="the copy differs from the source")
        return await super().verify(source, target)


async def test_a_copy_that_differs_never_replaces_its_source(tmp_path: Path) -> None:
    volumes, copier = CopyingVolumes(), UnequalCopier(unequal=2)
    async with serve(tmp_path, volumes, copier) as server:
        await create_volume(server)
        _, error = await resize(server, 32 * MIB)
        assert reason_of(error) == "VOLUME_FAILED"
        assert not volumes.exchanged
        assert not volumes.replacements, "the copy was not removed"
        volume = (await server.volumes.GetVolume(pb.GetVolumeRequest(name="data"))).volume
        assert (volume.size_bytes, volume.revision) == (64 * MIB, 1)


async def test_a_copy_that_differs_is_repeated_once(tmp_path: Path) -> None:
    volumes, copier = CopyingVolumes(), UnequalCopier(unequal=1)
    async with serve(tmp_path, volumes, copier) as server:
        await create_volume(server)
        events, error = await resize(server, 32 * MIB)
        assert error is None
        assert copier.copies == [False, True, True]
        assert events[-1].result.size_bytes == 32 * MIB
        assert len(volumes.exchanged) == 1


async def test_a_shrink_by_copy_is_refused_if_a_container_mounted_the_volume_meanwhile(tmp_path: Path) -> None:
    volumes = CopyingVolumes()
    async with serve(tmp_path, volumes) as server:
        await create_volume(server)
        volumes.before_locks = lambda: _mount(server)
        _, error = await resize(server, 32 * MIB)
        assert reason_of(error) == "VOLUME_IN_USE"
        assert not volumes.exchanged
        assert not volumes.replacements
        # A second call stops the container for the copy.
        events, error = await resize(server, 32 * MIB)
        assert error is None
        assert "stop" in [stage.name for stage in events[-2].operation.stages]


async def _mount(server: InMemoryServer) -> None:
    request = create_request()
    request.spec.mounts.append(container_pb2.Mount(volume="data", target="/data"))
    _, error = await read_to_end(server.containers.CreateContainer(request))
    assert error is None
