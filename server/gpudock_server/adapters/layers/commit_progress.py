"""Progress of a commit, from the size of the layer that the engine is writing.

The engine reports nothing until a commit has ended. But it writes the new layer into a folder (see `overlay2`) that is
on the same image layers as the container and has no init layer: the folder that is new since the start of the commit
and has these layers in its file `lower`.
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
    """Report the size of the new layer on `image_layers` below `engine_root` while the context is open."""
    before = await asyncio.to_thread(_folders, engine_root)
    watching = asyncio.create_task(_watch(engine_root, ":".join(image_layers), before, total, progress))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _watch(engine_root: str, lower: str, before: frozenset[str], total: int, progress: Progress) -> None:
    reported = 0
    while True:
        await asyncio.sleep(_SECONDS)
        found = await asyncio.to_thread(_new_layers, engine_root, lower, before)
        if len(found) != 1:
            # None yet, or several: another container of the same image is being committed too.
            continue
        try:
            size = await tree_bytes(found[0], apparent=True, timeout_seconds=_MEASURE_SECONDS)
        except (OSError, ValueError):
            continue
        reported = max(reported, min(size, total))
        progress(reported, total)


def _folders(engine_root: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(Path(engine_root, "overlay2")))  # noqa: PTH208 - only names are needed, and there are many
    except OSError:
        return frozenset()


def _new_layers(engine_root: str, lower: str, before: frozenset[str]) -> list[str]:
    fresh = (name for name in _folders(engine_root) - before if not name.endswith(_INIT))
    folders = (Path(engine_root, "overlay2", name) for name in fresh)
    return [str(folder / "diff") for folder in folders if _is_on(folder, lower)]


def _is_on(folder: Path, lower: str) -> bool:
    try:
        return (folder / "lower").read_text(encoding="ascii").strip() == lower
    except (OSError, UnicodeDecodeError):
        return False
