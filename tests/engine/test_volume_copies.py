"""Copies of volumes: verification, damage, and targets that are too small."""

# These tests may block their event loop: no other task runs in it.
# ruff: noqa: ASYNC240
from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from gpudock_server.adapters.volumes import (
    LoopBackend,
    MirrorVolumeCopier,
)
from gpudock_server.errors import (
    DiskFull,
    VolumeFailed,
)

from tests.engine.sample_trees import create_tree
from tests.engine.snapshot_host import ignore_progress
from tests.engine.volume_fixtures import (
    MIB,
    VOLUME_SIZE,
    new_uid,
    root,
)

__all__ = ["root"]


async def test_verify_finds_every_difference_and_a_final_copy_repairs_it(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    copier = MirrorVolumeCopier([loop])
    old = await loop.create(new_uid(), "data", 2 * VOLUME_SIZE)
    new = await loop.create(new_uid(), "data", VOLUME_SIZE)
    calls: list[tuple[int, int]] = []
    async with loop.open_files(old) as source:
        await asyncio.to_thread(create_tree, source, 1500)
        block = os.urandom(20 * MIB)
        Path(source, "block").write_bytes(block)
        await copier.copy(old, new, lambda current, total: calls.append((current, total)), final=False)
        assert calls[-1][0] == calls[-1][1] > 20 * MIB

        # One byte changes, and the modification time does not.
        before = Path(source, "block").stat()
        changed = bytes([block[0] ^ 1]) + block[1:]
        Path(source, "block").write_bytes(changed)
        os.utime(Path(source, "block"), ns=(before.st_atime_ns, before.st_mtime_ns))
        Path(source, "grown/odd/fifo").unlink()
        with pytest.raises(VolumeFailed, match="the copy differs from the source"):
            await copier.verify(old, new)
        await copier.copy(old, new, ignore_progress, final=True)
        digest_of_source = await copier.verify(old, new)
        assert digest_of_source.entries > 1500
        assert digest_of_source.content_bytes > 20 * MIB

        # Verify finds a damaged copy even if only the content differs, and the next final copy repairs it.
        async with loop.open_files(new) as target:
            copied = Path(target, "block")
            assert hashlib.sha256(copied.read_bytes()).digest() == hashlib.sha256(changed).digest()
            copied.write_bytes(block)
            os.utime(copied, ns=(before.st_atime_ns, before.st_mtime_ns))
            with pytest.raises(VolumeFailed, match="the content of a file"):
                await copier.verify(old, new)
            await copier.copy(old, new, ignore_progress, final=True)
            assert await copier.verify(old, new) == digest_of_source
            copied.chmod(0o600)
            with pytest.raises(VolumeFailed, match="/block differs in mode"):
                await copier.verify(old, new)
    for backing in (old, new):
        await loop.destroy(backing)


@pytest.mark.deep
async def test_a_copy_to_a_smaller_volume_fails_with_disk_full(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    copier = MirrorVolumeCopier([loop])
    old = await loop.create(new_uid(), "data", 2 * VOLUME_SIZE)
    new = await loop.create(new_uid(), "data", VOLUME_SIZE)
    async with loop.open_files(old) as source:
        Path(source, "block").write_bytes(os.urandom(VOLUME_SIZE))
        for final in (False, True):
            with pytest.raises(DiskFull):
                await copier.copy(old, new, ignore_progress, final=final)
    with pytest.raises(VolumeFailed, match="same volume backing"):
        await copier.copy(old, old, ignore_progress, final=True)
    for backing in (old, new):
        await loop.destroy(backing)


@pytest.mark.deep
async def test_a_final_copy_deletes_old_files_before_it_writes_new_ones(root: Path) -> None:
    """The target has space for the present files of the source, but not also for the files that were deleted since."""
    loop = LoopBackend(root, local=True)
    copier = MirrorVolumeCopier([loop])
    old = await loop.create(new_uid(), "data", 2 * VOLUME_SIZE)
    new = await loop.create(new_uid(), "data", VOLUME_SIZE)
    async with loop.open_files(old) as source:
        Path(source, "before").write_bytes(os.urandom(VOLUME_SIZE * 2 // 3))
        await copier.copy(old, new, ignore_progress, final=False)
        Path(source, "before").unlink()
        Path(source, "after").write_bytes(os.urandom(VOLUME_SIZE * 2 // 3))
        await copier.copy(old, new, ignore_progress, final=True)
        assert (await copier.verify(old, new)).entries == sum(1 for _ in Path(source).iterdir()) + 1
    for backing in (old, new):
        await loop.destroy(backing)
