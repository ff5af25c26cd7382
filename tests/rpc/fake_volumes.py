"""Volumes in memory that are nowhere, with the promises of `ports` that the RPCs lean on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gpudock_server.errors import SizeNotSupported
from gpudock_server.model.volume import (
    BackingOnDisk,
    PoolUsage,
    TreeSummary,
    VolumeBackendKind,
    VolumeBacking,
    VolumeIdentity,
    VolumeUsage,
)
from gpudock_server.ports import Progress, VolumeBackend, VolumeCopier
from typing_extensions import override


@dataclass(eq=False)
class FakeVolumes(VolumeBackend):
    """Volumes with a size that are nowhere; a size of UNSUPPORTED cannot be had."""

    UNSUPPORTED = 7 << 40

    used_bytes: int = 1 << 20

    @property
    @override
    def kind(self) -> VolumeBackendKind:
        return VolumeBackendKind.LOOP

    @override
    async def unavailable_reason(self) -> str:
        return ""

    @override
    async def create(
        self, uid: str, name: str, size_bytes: int, identity: VolumeIdentity | None = None
    ) -> VolumeBacking:
        if size_bytes == self.UNSUPPORTED:
            raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail="too large")
        return VolumeBacking(kind=self.kind, uid=uid, name=name, engine_volume=f"gpudock-{uid}", size_bytes=size_bytes)

    @override
    async def backings_on_disk(self) -> tuple[BackingOnDisk, ...]:
        return ()

    @override
    async def attach(self, backing: VolumeBacking) -> None:
        """Nothing is to be attached."""

    @override
    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        return backing.model_copy(update={"size_bytes": size_bytes})

    @override
    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        return backing.model_copy(update={"size_bytes": size_bytes})

    @override
    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:
        return False

    @override
    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        raise NotImplementedError

    @override
    async def content(self, backing: VolumeBacking) -> str:
        raise NotImplementedError

    @override
    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        raise NotImplementedError

    @override
    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        return VolumeUsage(
            used_bytes=self.used_bytes, size_bytes=backing.size_bytes, minimum_bytes=self.used_bytes + (1 << 20)
        )

    @override
    @asynccontextmanager
    async def open_files(self, backing: VolumeBacking) -> AsyncIterator[str]:
        yield "/nowhere"

    @override
    async def destroy(self, backing: VolumeBacking) -> None:
        """Nothing is to be destroyed."""

    @override
    async def pool(self) -> PoolUsage:
        return PoolUsage(total_bytes=8 << 40, free_bytes=8 << 40, promised_bytes=0, allocated_bytes=0)


class FakePlain(FakeVolumes):
    """Volumes without one."""

    @property
    @override
    def kind(self) -> VolumeBackendKind:
        return VolumeBackendKind.PLAIN


class FakeCopier(VolumeCopier):
    """Copies nothing."""

    @override
    async def copy(self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, final: bool) -> None:
        progress(0, 0)

    @override
    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        return TreeSummary(entries=0, content_bytes=0, sha256="")
