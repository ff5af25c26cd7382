"""Loop devices, found by the image behind them and never by a remembered number."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.subprocesses import ProgramFailed, run

_LOOP_MAJOR: Final = 7
_RELEASE_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.05


async def attach(image: Path) -> str:
    """The device of an image, attached if it was not. Raises ProgramFailed, OSError."""
    # --nooverlap gives back the device that the file has already, also when two ask at once.
    device = (await run("losetup", "--find", "--show", "--nooverlap", str(image))).strip()
    if not await asyncio.to_thread(is_backed_by, image, device):
        raise ProgramFailed(f"losetup gave {device or 'nothing'} for {image}, which has another file behind it")
    # Without a second copy of everything in the page cache, where the filesystem below can do it.
    with suppress(ProgramFailed):
        await run("losetup", "--direct-io=on", device)
    return device


async def device_of(image: Path) -> str:
    """The device that an image is attached to; empty when there is none."""
    if not await asyncio.to_thread(image.exists):
        return ""
    listed = await run("losetup", "--json", "--output", "NAME", "--associated", str(image))
    devices = json.loads(listed)["loopdevices"] if listed.strip() else []
    return str(devices[0]["name"]) if devices else ""


async def resize(device: str) -> None:
    """Have a device see that its image has another length now."""
    await run("losetup", "--set-capacity", device)


async def detach(device: str) -> bool:
    """Let go of a device. False, with nothing changed, while something has it mounted, in whatever namespace."""
    try:
        async with asyncio.timeout(_RELEASE_SECONDS):
            # Our own looks inside last milliseconds; a container's mount stays.
            while await asyncio.to_thread(_mounted, device):  # noqa: ASYNC110 - the kernel has no event for it
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        return False
    await run("losetup", "--detach", device)
    return True


def is_backed_by(image: Path, device: str) -> bool:
    """Whether it is this image that is behind a device."""
    try:
        there = Path(device).stat()
        if not stat.S_ISBLK(there.st_mode) or os.major(there.st_rdev) != _LOOP_MAJOR:
            return False
        number = f"{os.major(there.st_rdev)}:{os.minor(there.st_rdev)}"
        behind = Path(f"/sys/dev/block/{number}/loop/backing_file").read_text(encoding="utf-8").rstrip("\n")
        return os.path.samestat(Path(behind).stat(), image.stat())
    except OSError:
        return False


def _mounted(device: str) -> bool:
    # A mounted filesystem claims its device for itself; only a claim of our own runs into that.
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    os.close(descriptor)
    return False
