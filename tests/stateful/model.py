"""The model: the expected state of containers and volumes, without the rules of the daemon."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum


class State(StrEnum):
    """The states of a container without a running operation, named as in the contract."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    EXITED = "EXITED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


# The content of files by name below /work. GROUP is a file of the image, which tests only delete.
Files = dict[str, str]
GROUP = "/etc/group"


@dataclass(frozen=True)
class Spec:
    """The fields of a container's spec that the rules change."""

    gpus: int
    port: bool = False
    cpus: float = 0.0
    env: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    # (target, volume), in the order of the targets.
    mounts: tuple[tuple[str, str], ...] = ()

    @property
    def fixed(self) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
        """The fields whose change needs a new engine container, also if the container is stopped."""
        return (self.env, self.mounts)

    @property
    def volumes(self) -> frozenset[str]:
        """The names of the mounted volumes."""
        return frozenset(volume for _, volume in self.mounts)

    def without(self, volume: str) -> Spec:
        """This spec without the mounts of a volume."""
        return replace(self, mounts=tuple(mount for mount in self.mounts if mount[1] != volume))


@dataclass(frozen=True)
class PastRevision:
    """An earlier revision; `files` None: its files were not kept."""

    spec: Spec
    files: tuple[tuple[str, str], ...] | None


@dataclass
class ExpectedContainer:
    """The expected state of a container."""

    name: str
    uid: str
    state: State
    spec: Spec
    revision: int = 1
    files: Files = field(default_factory=dict)
    past: dict[int, PastRevision] = field(default_factory=dict)
    holds: bool = True
    gpus: int = 0

    @property
    def runs(self) -> bool:
        """Whether the container has a process."""
        return self.state in (State.RUNNING, State.PAUSED)

    def copy(self) -> ExpectedContainer:
        """A copy that can be changed independently."""
        return replace(self, files=dict(self.files), past=dict(self.past))

    def changed(self, spec: Spec, *, kept: bool = True, files: Files | None = None) -> ExpectedContainer:
        """The state after a change with a new revision. `files` are the files after it; None: they are unchanged."""
        after = self.copy()
        # A FAILED container has lost its engine container, and with it its files.
        known = tuple(sorted(self.files.items())) if kept and self.state is not State.FAILED else None
        after.past[self.revision] = PastRevision(self.spec, known)
        after.revision += 1
        after.spec = spec
        if self.runs:
            after.gpus = spec.gpus
        else:
            # A stopped container keeps its claims only if they are those that the new spec needs.
            after.holds = self.holds and (spec.gpus, spec.port) == (self.gpus, self.spec.port)
        if files is not None:
            after.files = dict(files)
        return after


@dataclass
class ExpectedVolume:
    """The expected state of a volume. Its files are not part of a container's revision."""

    name: str
    # The size at creation and after each change, in MiB; 0: a volume without a size.
    sizes: tuple[int, ...] = (0,)
    files: Files = field(default_factory=dict)
    # The name of the adopted engine volume, if the volume is one.
    adopted: str = ""

    @property
    def size_mib(self) -> int:
        """The current size in MiB."""
        return self.sizes[-1]

    def resized(self, size_mib: int) -> ExpectedVolume:
        """The state after a change of the size."""
        return replace(self, sizes=(*self.sizes, size_mib), files=dict(self.files))


def containers_mounting(known: Iterable[ExpectedContainer], volume: str) -> list[str]:
    """The names of all containers that mount a volume."""
    return sorted(container.name for container in known if volume in container.spec.volumes)
