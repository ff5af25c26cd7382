"""What callers can ask to be done to a container; valid when it is made, drafted by the module of its name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gpudock_server.model.engine import RegistryAuth
from gpudock_server.model.spec import ContainerSpec, GpuRequest, SnapshotPolicy


class SpecChange(Protocol):
    """A change of a spec, whole fields of it or single entries, whose new values are valid by themselves."""

    @property
    def fields(self) -> frozenset[str]:
        """The fields of the spec that it can change."""
        ...

    def apply(self, before: ContainerSpec) -> ContainerSpec:
        """The changed spec. Raises InvalidArgument if the result is not valid."""
        ...


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field of a spec gets another value, which is valid."""

    field: str
    value: object

    @property
    def fields(self) -> frozenset[str]:
        """That field."""
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
    """AUTO changes in place what it can and replaces the engine container for the rest."""

    AUTO = "AUTO"
    LIVE = "LIVE"
    RECREATE = "RECREATE"


@dataclass(frozen=True, slots=True)
class Create:
    """Make a container and, unless `create_only`, start it."""

    name: str
    spec: ContainerSpec
    owner: str = ""
    pull_policy: PullPolicy = PullPolicy.MISSING
    create_only: bool = False
    registry_auth: RegistryAuth | None = None
    pull_stall_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Start one that does not run; `gpus` replaces what its spec asks for."""

    name: str
    gpus: GpuRequest | None = None
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop one, and release what it holds unless `keep_resources`. `timeout` in seconds; None is its own."""

    name: str
    keep_resources: bool = False
    timeout: float | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Restart:
    """Stop and start one."""

    name: str
    timeout: float | None = None
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Pause:
    """Freeze one."""

    name: str
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Unpause:
    """Thaw one."""

    name: str
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove one with its files; `force` kills what runs."""

    name: str
    force: bool = False
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """Change what is not None. 0 is no limit (cpus, memory) or the engine's default (shm)."""

    name: str
    gpus: GpuRequest | None = None
    cpus: float | None = None
    memory_bytes: int | None = None
    shm_size_bytes: int | None = None
    strategy: ScaleStrategy = ScaleStrategy.AUTO
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


class FilesPolicy(StrEnum):
    """What becomes of a container's files when its image becomes another one."""

    CARRY_COMMIT = "CARRY_COMMIT"
    DISCARD = "DISCARD"


@dataclass(frozen=True, slots=True)
class Update:
    """Change the spec. `files` None refuses another image."""

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
    """Return to a revision: its spec and its files, or, with `spec_only`, its spec and the files of today."""

    name: str
    revision: int
    spec_only: bool = False
    snapshots: SnapshotPolicy | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Clone:
    """Make a container of a revision of another one (0: of what it is now), with `change` made to its spec."""

    name: str
    source: str
    change: SpecChange
    revision: int = 0
    owner: str = ""
    create_only: bool = False


@dataclass(frozen=True, slots=True)
class DeleteRevision:
    """Take a revision, and what is kept of its files, out of the history."""

    name: str
    revision: int
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """Make an image named `reference` of one's files; `pause` freezes what runs meanwhile.

    `replace` takes the name also from an image that gpudock did not commit for the container's owner.
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
