"""Volumes in memory, without files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gpudock_server.errors import SizeNotSupported, VolumeFailed, VolumeInUse, VolumeTooSmallForData
from gpudock_server.model.volume import (
    BackingOnDisk,
    PoolUsage,
    TreeSummary,
    VolumeBackendKind,
    VolumeBacking,
    VolumeIdentity,
    VolumeUsage,
)
from gpudock_server.ports import Progress, ShrinkNeedsCopy, VolumeBackend, VolumeCopier
from typing_extensions import override


@dataclass(eq=False)
class FakeVolumes(VolumeBackend):
    """Stores by uid, each with its size and the name of its content. The size UNSUPPORTED is refused.

    A shrink needs a copy if `copies`. `used_bytes` is reported as the usage of every store.
    """

    UNSUPPORTED = 7 << 40

    used_bytes: int = 1 << 20
    copies: bool = False
    stores: dict[str, tuple[int, str]] = field(default_factory=dict)
    backings: dict[str, VolumeBacking] = field(default_factory=dict)
    identities: dict[str, VolumeIdentity | None] = field(default_factory=dict)
    # The uids of stores whose files are open; once for each time that they are open.
    opened: list[str] = field(default_factory=list)

    @property
    @override
    def kind(self) -> VolumeBackendKind:
        return VolumeBackendKind.LOOP

    @override
    async def unavailable_reason(self) -> str:
        return ""

    def _failed(self, backing: VolumeBacking, call: str, detail: str) -> VolumeFailed:
        return VolumeFailed(volume=backing.name, call=call, detail=detail)

    def _check_size(self, name: str, size_bytes: int) -> None:
        if size_bytes == self.UNSUPPORTED:
            raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail="too large")

    def _require_store(self, backing: VolumeBacking, call: str) -> None:
        if backing.uid not in self.stores:
            raise self._failed(backing, call, "its folder does not exist")

    def mounted(self, backing: VolumeBacking) -> bool:
        """Return whether a volume is mounted."""
        return backing.uid in self.opened

    def _check_unused(self, backing: VolumeBacking) -> None:
        if self.mounted(backing):
            raise VolumeInUse(volume=backing.name, holders=("a process or container that mounts it",))

    def _make(self, backing: VolumeBacking, content: str, identity: VolumeIdentity | None) -> VolumeBacking:
        self.stores.setdefault(backing.uid, (backing.size_bytes, content))
        self.identities.setdefault(backing.uid, identity)
        return self.backings.setdefault(backing.uid, backing)

    @override
    async def create(
        self, uid: str, name: str, size_bytes: int, identity: VolumeIdentity | None = None
    ) -> VolumeBacking:
        self._check_size(name, size_bytes)
        backing = VolumeBacking(
            kind=self.kind, uid=uid, name=name, engine_volume=f"gpudock-{uid}", size_bytes=size_bytes
        )
        return self._make(backing, f"of {name}", identity)

    @override
    async def backings_on_disk(self) -> tuple[BackingOnDisk, ...]:
        return tuple(
            BackingOnDisk(uid=uid, folder=f"/nowhere/{uid}", backing=backing, identity=self.identities[uid])
            for uid, backing in self.backings.items()
        )

    @override
    async def attach(self, backing: VolumeBacking) -> None:
        self._require_store(backing, "attach")

    def _resized(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        self.stores[backing.uid] = (size_bytes, self.stores[backing.uid][1])
        self.backings[backing.uid] = backing.model_copy(update={"size_bytes": size_bytes})
        return self.backings[backing.uid]

    @override
    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        self._check_size(backing.name, size_bytes)
        self._require_store(backing, "grow")
        return self._resized(backing, size_bytes)

    @override
    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        self._require_store(backing, "shrink")
        if size_bytes < self._minimum_bytes:
            raise VolumeTooSmallForData(
                volume=backing.name,
                requested_bytes=size_bytes,
                used_bytes=self.used_bytes,
                minimum_bytes=self._minimum_bytes,
            )
        if self.copies:
            raise ShrinkNeedsCopy("it cannot shrink in place")
        return self._resized(backing, size_bytes)

    @override
    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:
        return self.copies

    @override
    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        self._check_size(backing.name, size_bytes)
        changes = {"uid": uid, "size_bytes": size_bytes, "engine_volume": f"gpudock-{uid}"}
        return self._make(backing.model_copy(update=changes), "empty", None)

    @override
    async def content(self, backing: VolumeBacking) -> str:
        self._require_store(backing, "open")
        return self.stores[backing.uid][1]

    @override
    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        for backing in (holder, other):
            self._require_store(backing, "exchange")
        first, second = self.stores[holder.uid], self.stores[other.uid]
        if first[1] != content:
            if second[1] != content:
                raise self._failed(holder, "exchange", f"neither has content {content}")
            for backing in (holder, other):
                self._check_unused(backing)
            self.stores[holder.uid], self.stores[other.uid] = second, first
        for backing in (holder, other):
            assert self.stores[backing.uid][0] == backing.size_bytes, "the size was not exchanged with the content"
            self.backings[backing.uid] = backing

    @property
    def _minimum_bytes(self) -> int:
        return self.used_bytes + (1 << 20)

    @override
    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        self._require_store(backing, "open")
        return VolumeUsage(used_bytes=self.used_bytes, size_bytes=backing.size_bytes, minimum_bytes=self._minimum_bytes)

    @override
    @asynccontextmanager
    async def open_files(self, backing: VolumeBacking) -> AsyncIterator[str]:
        self._require_store(backing, "open")
        self.opened.append(backing.uid)
        try:
            yield "/nowhere"
        finally:
            self.opened.remove(backing.uid)

    @override
    async def destroy(self, backing: VolumeBacking) -> None:
        self._check_unused(backing)
        for records in (self.stores, self.backings, self.identities):
            records.pop(backing.uid, None)

    @override
    async def pool(self) -> PoolUsage:
        promised = sum(size for size, _ in self.stores.values())
        return PoolUsage(total_bytes=8 << 40, free_bytes=8 << 40, promised_bytes=promised, allocated_bytes=0)


class FakePlainVolumes(FakeVolumes):
    """Volumes without a size; only the engine knows them."""

    @property
    @override
    def kind(self) -> VolumeBackendKind:
        return VolumeBackendKind.PLAIN

    @override
    def _check_size(self, name: str, size_bytes: int) -> None:
        if size_bytes:
            raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail="PLAIN volumes have no size")

    @override
    def _require_store(self, backing: VolumeBacking, call: str) -> None:
        """Only the engine knows whether the volume exists."""

    @override
    async def backings_on_disk(self) -> tuple[BackingOnDisk, ...]:
        return ()

    @override
    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        self._check_size(backing.name, size_bytes)
        return backing

    @override
    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        raise self._failed(backing, "replace", "PLAIN volumes are never replaced")

    @override
    async def content(self, backing: VolumeBacking) -> str:
        raise self._failed(backing, "replace", "PLAIN volumes are never replaced")

    @override
    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        raise self._failed(holder, "replace", "PLAIN volumes are never replaced")


class FakeCopier(VolumeCopier):
    """Copies no files."""

    @override
    async def copy(self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, final: bool) -> None:
        progress(0, 0)

    @override
    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        return TreeSummary(entries=0, content_bytes=0, sha256="")
