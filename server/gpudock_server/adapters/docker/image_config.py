"""Builds an image config for `docker load` from what the engine's inspect calls show of images. Pure.

The keys are those of the image specification (opencontainers/image-spec, config.md). The engine stores these keys, and
its API shows them in its own spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from gpudock_server.adapters.docker.nvidia_env import restored_environment
from gpudock_server.adapters.docker.translate import Json
from gpudock_server.model.engine import RESERVED_LABEL_PREFIX
from gpudock_server.model.record import now

# The keys of a container's config that an image config has. The others belong to one container: host name, streams.
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
    """An image config with these `layers` and run settings (`run`); platform and author are those of image `shown`."""
    config: Json = {spec: shown[engine] for engine, spec in _PLATFORM.items() if shown.get(engine)}
    return config | {
        "created": now().isoformat(),
        "config": dict(run),
        "rootfs": {"type": "layers", "diff_ids": list(layers)},
        "history": list(history),
    }


def history_of(shown: Sequence[Mapping[str, Any]], layers: int) -> list[Json]:
    """The history for an image config, oldest first, from the engine's (newest first).

    The engine does not report which entries created no layer. Entries with a size created one; so did, from the oldest
    on, as many of the others as are needed to make `layers`.
    """
    entries = list(reversed(shown))
    missing = layers - sum(1 for entry in entries if entry.get("Size"))
    history = []
    for entry in entries:
        empty = not entry.get("Size") and missing <= 0
        missing -= not entry.get("Size") and not empty
        converted = {
            "created": datetime.fromtimestamp(entry.get("Created") or 0, UTC).isoformat(),
            "created_by": entry.get("CreatedBy") or "",
            "comment": entry.get("Comment") or "",
            "empty_layer": empty,
        }
        history.append({key: value for key, value in converted.items() if value})
    return history


def merged_history_entry(count: int) -> Json:
    """The history entry for `count` merged layers."""
    return {"created": now().isoformat(), "created_by": "gpudockd", "comment": f"{count} layers merged"}


def strip_identity(run: Mapping[str, Any], base: Mapping[str, Any]) -> Json:
    """A container's config (`run`) without what identifies the container; `base` is the config of its image.

    The variables that gpudockd sets for NVIDIA's toolkit get the image's value back, or are removed.
    """
    cleaned = {key: run[key] for key in _IMAGE_CONFIG_KEYS if key in run}
    cleaned["Env"] = restored_environment(run.get("Env") or (), base.get("Env") or ())
    labels = run.get("Labels") or {}
    cleaned["Labels"] = {key: value for key, value in labels.items() if not key.startswith(RESERVED_LABEL_PREFIX)}
    return cleaned
