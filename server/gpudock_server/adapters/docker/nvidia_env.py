"""Environment variables by which NVIDIA's container toolkit chooses what a container gets of the host. Pure.

Where NVIDIA's runtime is the engine's default, or its hook is installed, the toolkit reads these from the container's
environment, which is the spec's with the image's below it. Left to the user or the image, they add devices that nobody
claimed. The names are those that nvidia-container-toolkit 1.20 reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import MappingProxyType
from typing import Final

from gpudock_server.model.engine import NvidiaSwitch

VISIBLE_DEVICES: Final = "NVIDIA_VISIBLE_DEVICES"
# NVIDIA's word for "the runtime has nothing to do here"; an empty value would fall back to the image's own.
NO_DEVICES: Final = "void"

# Switch -> the value that asks for nothing. The first four count only when they are `enabled`. The others are lists of
# devices: empty is none to every version of the toolkit, while an unset NVIDIA_IMEX_CHANNELS is "all" for an old CUDA
# image (CUDA_VERSION without NVIDIA_REQUIRE_CUDA), and some versions pass `void` on as the name of a channel.
_DISABLED_VALUES: Final = MappingProxyType(
    {
        NvidiaSwitch.GDS: "disabled",
        NvidiaSwitch.MOFED: "disabled",
        NvidiaSwitch.GDRCOPY: "disabled",
        NvidiaSwitch.NVSWITCH: "disabled",
        NvidiaSwitch.IMEX_CHANNELS: "",
        NvidiaSwitch.MIG_CONFIG_DEVICES: "",
        NvidiaSwitch.MIG_MONITOR_DEVICES: "",
    }
)


def enforced_environment(gpu_uuids: Sequence[str], allowed: Collection[NvidiaSwitch]) -> dict[str, str]:
    """The variables that gpudock sets in every container: its cards, and each switch that is not `allowed`, off."""
    switches = {switch.value: value for switch, value in _DISABLED_VALUES.items() if switch not in allowed}
    return {**switches, VISIBLE_DEVICES: ",".join(gpu_uuids) or NO_DEVICES}


def restored_environment(environment: Sequence[str], image_environment: Sequence[str]) -> list[str]:
    """A committed container's environment with the forced values replaced by what its image says, or removed."""
    forced = {f"{name}={value}" for name, value in enforced_environment((), ()).items()}
    names = {line.partition("=")[0] for line in environment if line in forced}
    of_image = [line for line in image_environment if line.partition("=")[0] in names]
    return [line for line in environment if line not in forced] + of_image
