"""How far the engine is with an image of a container's files, by looking at the layer that it is writing.

The engine says nothing until a commit has ended. But it writes the new layer into a folder of its own (see `overlay2`),
which lies on the same image layers as the container and has no init layer: of the folders that are new since the commit
began, it is the one whose `lower` says so.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from gpudock_server.adapters.host.disk_usage import tree_bytes
from gpudock_server.ports import Progress

_SECONDS = 0.25
_MEASURE_SECONDS = 60.0
_INIT = "-init"


@asynccontextmanager
async def track_commit(
    engine_root: str, image_layers: Sequence[str], total: int, progress: Progress
) -> AsyncIterator[None]:
    """Tell of the layer that appears on `image_layers` below `engine_root` while this is entered."""
    before = await asyncio.to_thread(_folders, engine_root)
    watching = asyncio.create_task(_watch(engine_root, ":".join(image_layers), before, total, progress))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _watch(engine_root: str, lower: str, before: frozenset[str], total: int, progress: Progress) -> None:
    told = 0
    while True:
        await asyncio.sleep(_SECONDS)
        found = await asyncio.to_thread(_new_layers, engine_root, lower, before)
        if len(found) != 1:
            # None yet; or another container of the same image is being committed too, and who is who nobody can say.
            continue
        try:
            size = await tree_bytes(found[0], apparent=True, timeout_seconds=_MEASURE_SECONDS)
        except (OSError, ValueError):
            continue
        told = max(told, min(size, total))
        progress(told, total)


def _folders(engine_root: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(Path(engine_root, "overlay2")))  # noqa: PTH208 - names alone, of many
    except OSError:
        return frozenset()


def _new_layers(engine_root: str, lower: str, before: frozenset[str]) -> list[str]:
    fresh = (name for name in _folders(engine_root) - before if not name.endswith(_INIT))
    folders = (Path(engine_root, "overlay2", name) for name in fresh)
    return [str(folder / "diff") for folder in folders if _lies_on(folder, lower)]


def _lies_on(folder: Path, lower: str) -> bool:
    try:
        return (folder / "lower").read_text(encoding="ascii").strip() == lower
    except (OSError, UnicodeDecodeError):
        return False
