"""The environment variables with which NVIDIA's container toolkit chooses what a container gets of the host. Pure.

If NVIDIA's runtime is the engine's default, or its hook is installed, the toolkit reads these from the container's
environment: the image's, overridden by the spec's. A user or an image could use them to add devices that were not
claimed. The names are those that nvidia-container-toolkit 1.20 reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import MappingProxyType
from typing import Final

from gpudock_server.model.engine import NvidiaSwitch

VISIBLE_DEVICES: Final = "NVIDIA_VISIBLE_DEVICES"
# Tells the runtime to do nothing; with an empty value it would use the image's value.
NO_DEVICES: Final = "void"

# Switch -> the value that requests nothing. The first four take effect only if `enabled`. The others are lists of
# devices: every version of the toolkit reads an empty list as none. An unset NVIDIA_IMEX_CHANNELS means "all" for an
# old CUDA image (CUDA_VERSION without NVIDIA_REQUIRE_CUDA), and some versions take `void` for the name of a channel.
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
    """The variables that gpudock sets in every container: its GPUs, and all switches off that are not `allowed`."""
    switches = {switch.value: value for switch, value in _DISABLED_VALUES.items() if switch not in allowed}
    return {**switches, VISIBLE_DEVICES: ",".join(gpu_uuids) or NO_DEVICES}


def restored_environment(environment: Sequence[str], image_environment: Sequence[str]) -> list[str]:
    """A committed container's environment with the enforced values replaced by its image's, or removed."""
    enforced = {f"{name}={value}" for name, value in enforced_environment((), ()).items()}
    names = {line.partition("=")[0] for line in environment if line in enforced}
    of_image = [line for line in image_environment if line.partition("=")[0] in names]
    return [line for line in environment if line not in enforced] + of_image
