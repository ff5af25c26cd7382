"""Loop devices, always found by their image and never by a stored number."""

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
    """Attach an image to a loop device, unless it is attached; returns the device. Raises ProgramFailed, OSError."""
    # --nooverlap returns the existing device of the file, also for concurrent calls.
    device = (await run("losetup", "--find", "--show", "--nooverlap", str(image))).strip()
    if not await asyncio.to_thread(is_backed_by, image, device):
        raise ProgramFailed(f"losetup returned {device or 'no device'} for {image}, but another file is attached to it")
    # Avoids a second copy of all data in the page cache, if the filesystem below supports it.
    with suppress(ProgramFailed):
        await run("losetup", "--direct-io=on", device)
    return device


async def device_of(image: Path) -> str:
    """Return the device that an image is attached to; empty if there is none."""
    if not await asyncio.to_thread(image.exists):
        return ""
    listed = await run("losetup", "--json", "--output", "NAME", "--associated", str(image))
    devices = json.loads(listed)["loopdevices"] if listed.strip() else []
    return str(devices[0]["name"]) if devices else ""


async def resize(device: str) -> None:
    """Update the capacity of a device after its image has changed its length."""
    await run("losetup", "--set-capacity", device)


async def detach(device: str) -> bool:
    """Detach a device; False, with nothing changed, while it is mounted in any namespace."""
    try:
        async with asyncio.timeout(_RELEASE_SECONDS):
            # The daemon's own mounts last milliseconds; the mount of a container stays.
            while await asyncio.to_thread(_mounted, device):  # noqa: ASYNC110 - the kernel has no event for an unmount
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        return False
    await run("losetup", "--detach", device)
    return True


def is_backed_by(image: Path, device: str) -> bool:
    """Whether `device` is a loop device of `image`."""
    try:
        there = Path(device).stat()
        if not stat.S_ISBLK(there.st_mode) or os.major(there.st_rdev) != _LOOP_MAJOR:
            return False
        number = f"{os.major(there.st_rdev)}:{os.minor(there.st_rdev)}"
        backing_file = Path(f"/sys/dev/block/{number}/loop/backing_file").read_text(encoding="utf-8").rstrip("\n")
        return os.path.samestat(Path(backing_file).stat(), image.stat())
    except OSError:
        return False


def _mounted(device: str) -> bool:
    # A mounted filesystem opens its device exclusively, so another exclusive open fails.
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    os.close(descriptor)
    return False
