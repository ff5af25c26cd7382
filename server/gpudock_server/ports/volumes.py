"""Stores for volumes, and moving files between them."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from gpudock_server.model.volume import (
    BackingOnDisk,
    PoolUsage,
    TreeSummary,
    VolumeBackendKind,
    VolumeBacking,
    VolumeIdentity,
    VolumeUsage,
)
from gpudock_server.ports.progress import Progress


class ShrinkNeedsCopy(Exception):
    """A store cannot become smaller where it is; its files have to move to a smaller one. Nothing was changed."""


class VolumeBackend(Protocol):
    """One way to keep volumes on this host. Raises VolumeFailed, DiskFull, and what the methods name.

    Every method may be repeated: done twice is done once, also where the first time was cut off by `kill -9`. Calls
    that change one volume must not overlap; `usage`, `open_files` and `pool` may be called at any time.
    """

    @property
    def kind(self) -> VolumeBackendKind:
        """Which one it is."""
        ...

    async def unavailable_reason(self) -> str:
        """Why no volume can be made this way on this host; empty when one can."""
        ...

    async def create(
        self, uid: str, name: str, size_bytes: int, identity: VolumeIdentity | None = None
    ) -> VolumeBacking:
        """Make an empty store, ready for the engine. Raises SizeNotSupported.

        `identity` is kept with it. The engine's volume is the caller's to make, from the backing's `engine_volume` and
        `driver_options`.
        """
        ...

    async def backings_on_disk(self) -> tuple[BackingOnDisk, ...]:
        """The stores of this kind that are on this host's disk, whoever's they are, damaged ones too."""
        ...

    async def attach(self, backing: VolumeBacking) -> None:
        """Make it ready for the engine again, after a reboot say."""
        ...

    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """Make it larger where it is, under whatever uses it; the backing as it is then. Raises SizeNotSupported."""
        ...

    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """Make it smaller where it is, under whatever uses it; the backing as it is then.

        Raises VolumeTooSmallForData with nothing changed, and ShrinkNeedsCopy.
        """
        ...

    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:
        """Whether `shrink` to that size is known to raise ShrinkNeedsCopy. Where it is, `replacement` can be made."""
        ...

    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        """Make an empty store of another size that `exchange` can put in the place of this one.

        `destroy` needs no more of what this gives than its `kind` and `uid`. Raises SizeNotSupported.
        """
        ...

    async def content(self, backing: VolumeBacking) -> str:
        """Names what a store holds, wherever `exchange` brings it."""
        ...

    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        """Have `holder` hold `content`, which one of the two holds, and `other` what the other one holds.

        Both are given as they are to be afterwards, with the sizes that go with their contents. The
        engine volumes stay as they are and show it from their next mount on. Raises VolumeInUse, with nothing changed,
        while anything has either mounted.
        """
        ...

    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        """How full it is, whether it is mounted or not."""
        ...

    def open_files(self, backing: VolumeBacking) -> AbstractAsyncContextManager[str]:
        """A folder in which the daemon sees the volume's files, whether the engine has it mounted or not.

        For its own reading and writing: what a program makes of the path may lead it elsewhere. While it is open,
        `destroy` says that it is in use.
        """
        ...

    async def destroy(self, backing: VolumeBacking) -> None:
        """Remove the store and all that is in it. Raises VolumeInUse while anything has it mounted."""
        ...

    async def pool(self) -> PoolUsage:
        """The filesystem that the stores lie on, and what all of them have of it."""
        ...


class VolumeCopier(Protocol):
    """Carries a volume's files to another store. Raises VolumeFailed, DiskFull."""

    async def copy(self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, final: bool) -> None:
        """Make the target's files equal to the source's, moving only what has changed since the copy before.

        The source may be in use; the `final` copy is made once nothing writes any more, and what was known of earlier
        copies is forgotten with it: a copy after it starts from the beginning. Until the final one, the target has more
        in it than the files. `progress` counts the bytes of disk that the source's files take.
        """
        ...

    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        """What both hold, read again in full, while neither is in use. Raises VolumeFailed where they differ."""
        ...
