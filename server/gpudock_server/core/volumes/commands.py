"""What callers can ask to be done to a volume; valid when it is made, drafted by the module of its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpudock_server.model.volume import VolumeBackendKind


@dataclass(frozen=True, slots=True)
class Create:
    """Make a volume; `size_bytes` 0 is one without a size, `backend` None the best that the host has."""

    name: str
    size_bytes: int = 0
    owner: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    backend: VolumeBackendKind | None = None


@dataclass(frozen=True, slots=True)
class Resize:
    """Give one another size."""

    name: str
    size_bytes: int
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove one with its files; with `force` it is taken out of the specs of containers that do not run."""

    name: str
    etag: str = ""
    force: bool = False


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take in a volume that somebody made in the engine: as it is, or copied into a new one with a size."""

    name: str
    engine_volume: str
    size_bytes: int = 0
    owner: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    backend: VolumeBackendKind | None = None


Command = Create | Resize | Delete | Adopt
