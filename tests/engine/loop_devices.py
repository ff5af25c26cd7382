"""Loop devices, found by the image files behind them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def loop_devices_below(folder: Path) -> dict[str, str]:
    """Loop devices whose image file lies below a folder: device -> image file."""
    command = ["losetup", "--noheadings", "--raw", "--list", "--output", "NAME,BACK-FILE"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pairs = (line.split(" ", 1) for line in output.splitlines() if " " in line)
    return {device: image for device, image in pairs if image.startswith(f"{folder}/")}


def detach_loop_devices(folder: Path) -> None:
    """Detach every loop device whose image file lies below a folder; the kernel keeps a mounted one until unmount."""
    for device in loop_devices_below(folder):
        subprocess.run(["losetup", "--detach", device], check=True)
