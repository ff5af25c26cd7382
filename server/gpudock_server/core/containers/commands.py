"""The commands on containers, validated before they are created; each is drafted by the module of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gpudock_server.model.engine import RegistryAuth
from gpudock_server.model.spec import ContainerSpec, GpuRequest, SnapshotPolicy


class SpecChange(Protocol):
    """A change of whole fields or single entries of a spec; each new value is validated by itself."""

    @property
    def fields(self) -> frozenset[str]:
        """The fields of the spec that the change sets."""
        ...

    def apply(self, before: ContainerSpec) -> ContainerSpec:
        """The changed spec. Raises InvalidArgument if the result is not valid."""
        ...


@dataclass(frozen=True, slots=True)
class FieldChange:
    """Set one field of a spec to a valid value."""

    field: str
    value: object

    @property
    def fields(self) -> frozenset[str]:
        """The field that the change sets."""
        return frozenset({self.field})

    def apply(self, before: ContainerSpec) -> ContainerSpec:
        """The changed spec."""
        return before.changed(**{self.field: self.value})


class PullPolicy(StrEnum):
    """When an image is pulled."""

    ALWAYS = "ALWAYS"
    MISSING = "MISSING"
    NEVER = "NEVER"


class ScaleStrategy(StrEnum):
    """How to scale: LIVE only in place, RECREATE with a new engine container, AUTO in place if possible."""

    AUTO = "AUTO"
    LIVE = "LIVE"
    RECREATE = "RECREATE"


@dataclass(frozen=True, slots=True)
class Create:
    """Create a container and, unless `create_only`, start it."""

    name: str
    spec: ContainerSpec
    owner: str = ""
    pull_policy: PullPolicy = PullPolicy.MISSING
    create_only: bool = False
    registry_auth: RegistryAuth | None = None
    pull_stall_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Start a container. `gpus` replaces the GPUs in its spec."""

    name: str
    gpus: GpuRequest | None = None
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop a container; release its GPUs and ports unless `keep_resources`. `timeout`: seconds; None: the spec's."""

    name: str
    keep_resources: bool = False
    timeout: float | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Restart:
    """Stop and start a container."""

    name: str
    timeout: float | None = None
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Pause:
    """Freeze the processes of a container."""

    name: str
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Unpause:
    """Unfreeze the processes of a container."""

    name: str
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a container and its files. `force`: even if it is running."""

    name: str
    force: bool = False
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """Change the resources that are not None. 0: no limit (CPUs, memory) or the engine's default (/dev/shm)."""

    name: str
    gpus: GpuRequest | None = None
    cpus: float | None = None
    memory_bytes: int | None = None
    shm_size_bytes: int | None = None
    strategy: ScaleStrategy = ScaleStrategy.AUTO
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


class FilesPolicy(StrEnum):
    """What happens to a container's files when its image changes."""

    CARRY_COMMIT = "CARRY_COMMIT"
    DISCARD = "DISCARD"


@dataclass(frozen=True, slots=True)
class Update:
    """Change the spec of a container. `files` None: a change of the image is refused."""

    name: str
    change: SpecChange
    files: FilesPolicy | None = None
    pull_policy: PullPolicy = PullPolicy.MISSING
    registry_auth: RegistryAuth | None = None
    pull_stall_seconds: float | None = None
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Rollback:
    """Roll a container back to the spec and files of a revision, or, with `spec_only`, to the spec only."""

    name: str
    revision: int
    spec_only: bool = False
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Clone:
    """Create a container from a revision of another one (0: its current state), with `change` applied to the spec."""

    name: str
    source: str
    change: SpecChange
    revision: int = 0
    owner: str = ""
    create_only: bool = False


@dataclass(frozen=True, slots=True)
class DeleteRevision:
    """Delete a revision and its snapshot."""

    name: str
    revision: int
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """Create an image named `reference` from a container's files. `pause`: freeze a running container for it.

    `replace`: take the name even from an image that gpudock did not commit for the container's owner.
    """

    name: str
    reference: str
    author: str = ""
    comment: str = ""
    changes: tuple[str, ...] = ()
    pause: bool = True
    replace: bool = False
    etag: str = ""


Command = (
    Create
    | Start
    | Stop
    | Restart
    | Pause
    | Unpause
    | Delete
    | Scale
    | Update
    | Rollback
    | Clone
    | DeleteRevision
    | Commit
)
