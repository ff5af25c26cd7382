"""Loop devices that tests leave, found by the images behind them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def loop_devices_below(folder: Path) -> dict[str, str]:
    """Device -> image, of the images below a folder."""
    words = ["losetup", "--noheadings", "--raw", "--list", "--output", "NAME,BACK-FILE"]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    pairs = (line.split(" ", 1) for line in shown.splitlines() if " " in line)
    return {device: image for device, image in pairs if image.startswith(f"{folder}/")}


def detach_loop_devices(folder: Path) -> None:
    """Let go of all of them; what is mounted goes when it is unmounted."""
    for device in loop_devices_below(folder):
        subprocess.run(["losetup", "--detach", device], check=True)
