"""The commands on volumes, validated before they are created; each is drafted by the module of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpudock_server.model.volume import VolumeBackendKind


@dataclass(frozen=True, slots=True)
class Create:
    """Create a volume. `size_bytes` 0: without a size. `backend` None: the best backend of the node."""

    name: str
    size_bytes: int = 0
    owner: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    backend: VolumeBackendKind | None = None


@dataclass(frozen=True, slots=True)
class Resize:
    """Change the size of a volume."""

    name: str
    size_bytes: int
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a volume and its files. `force`: remove its mount from the specs of stopped containers first."""

    name: str
    etag: str = ""
    force: bool = False


@dataclass(frozen=True, slots=True)
class Adopt:
    """Adopt an existing engine volume: as it is, or copied into a new volume with a size."""

    name: str
    engine_volume: str
    size_bytes: int = 0
    owner: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    backend: VolumeBackendKind | None = None


Command = Create | Resize | Delete | Adopt
