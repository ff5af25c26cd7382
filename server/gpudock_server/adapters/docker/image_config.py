"""An image's config as `docker load` takes it, put together from what the engine shows of images. Pure.

The keys are those of the image specification (opencontainers/image-spec, config.md), under which the engine keeps them
and which it shows in its own spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from gpudock_server.adapters.docker.nvidia_env import restored_environment
from gpudock_server.adapters.docker.translate import Json
from gpudock_server.model.engine import RESERVED_LABEL_PREFIX
from gpudock_server.model.record import now

# What of a container's config says how to run its image. The rest is that one container's: its host name, its streams.
_IMAGE_CONFIG_KEYS: Final = (
    "User", "ExposedPorts", "Env", "Cmd", "Healthcheck", "ArgsEscaped", "Volumes", "WorkingDir", "Entrypoint",
    "OnBuild", "Labels", "StopSignal", "StopTimeout", "Shell",
)  # fmt: skip
# The engine's spelling -> the specification's.
_PLATFORM: Final = {
    "Architecture": "architecture",
    "Os": "os",
    "OsVersion": "os.version",
    "Variant": "variant",
    "Author": "author",
}


def image_config(
    shown: Mapping[str, Any], run: Mapping[str, Any], layers: Sequence[str], history: Sequence[Json]
) -> Json:
    """The config of an image of `layers`, run as `run` says, for the platform and by the author of what is `shown`."""
    config: Json = {spec: shown[engine] for engine, spec in _PLATFORM.items() if shown.get(engine)}
    return config | {
        "created": now().isoformat(),
        "config": dict(run),
        "rootfs": {"type": "layers", "diff_ids": list(layers)},
        "history": list(history),
    }


def history_of(shown: Sequence[Mapping[str, Any]], layers: int) -> list[Json]:
    """A history for the config out of what the engine shows of one (the newest first).

    The engine does not say which lines made no layer. Those with a size did make one, and as many of the others, from
    the oldest on, as are still missing.
    """
    lines = list(reversed(shown))
    missing = layers - sum(1 for line in lines if line.get("Size"))
    history = []
    for line in lines:
        empty = not line.get("Size") and missing <= 0
        missing -= not line.get("Size") and not empty
        entry = {
            "created": datetime.fromtimestamp(line.get("Created") or 0, UTC).isoformat(),
            "created_by": line.get("CreatedBy") or "",
            "comment": line.get("Comment") or "",
            "empty_layer": empty,
        }
        history.append({key: value for key, value in entry.items() if value})
    return history


def merged_history_entry(count: int) -> Json:
    """The line of a history that stands for `count` layers made one."""
    return {"created": now().isoformat(), "created_by": "gpudockd", "comment": f"{count} layers made one"}


def strip_identity(run: Mapping[str, Any], base: Mapping[str, Any]) -> Json:
    """A container's config, with nothing in it of which container that was; `base` is its image's.

    What gpudockd set for NVIDIA's toolkit is taken back to what the image said, or away.
    """
    cleaned = {key: run[key] for key in _IMAGE_CONFIG_KEYS if key in run}
    cleaned["Env"] = restored_environment(run.get("Env") or (), base.get("Env") or ())
    labels = run.get("Labels") or {}
    cleaned["Labels"] = {key: value for key, value in labels.items() if not key.startswith(RESERVED_LABEL_PREFIX)}
    return cleaned
