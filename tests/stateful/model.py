"""What must be true of each container: a model so simple that it can be believed by reading it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum


class State(StrEnum):
    """The states that a container rests in, by the names that the contract gives them."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    EXITED = "EXITED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


# Names below /work with what is in them. GROUP is a file of the image, which a container can only delete.
Files = dict[str, str]
GROUP = "/etc/group"


@dataclass(frozen=True)
class Spec:
    """Of the spec, what the test changes."""

    gpus: int
    port: bool = False
    cpus: float = 0.0
    env: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    # Target -> volume, in the order of the targets.
    mounts: tuple[tuple[str, str], ...] = ()

    @property
    def fixed(self) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
        """What takes a new engine container, also of what does not run."""
        return (self.env, self.mounts)

    @property
    def volumes(self) -> frozenset[str]:
        """The names of those that it mounts."""
        return frozenset(volume for _, volume in self.mounts)

    def without(self, volume: str) -> Spec:
        """The same, but that volume is mounted nowhere."""
        return replace(self, mounts=tuple(mount for mount in self.mounts if mount[1] != volume))


@dataclass(frozen=True)
class PastRevision:
    """A revision that was replaced; `files` None: they were not kept."""

    spec: Spec
    files: tuple[tuple[str, str], ...] | None


@dataclass
class ExpectedContainer:
    """One container, as it must be."""

    name: str
    uid: str
    state: State
    spec: Spec
    revision: int = 1
    files: Files = field(default_factory=dict)
    past: dict[int, PastRevision] = field(default_factory=dict)
    holds: bool = True
    cards: int = 0

    @property
    def runs(self) -> bool:
        """Whether it has a process."""
        return self.state in (State.RUNNING, State.PAUSED)

    def copy(self) -> ExpectedContainer:
        """One that can be changed without changing this one."""
        return replace(self, files=dict(self.files), past=dict(self.past))

    def changed(self, spec: Spec, *, kept: bool = True, files: Files | None = None) -> ExpectedContainer:
        """After a change that made a revision; `files` are what it has then, if they are others than before."""
        after = self.copy()
        # What the engine lost has no files to keep.
        known = tuple(sorted(self.files.items())) if kept and self.state is not State.FAILED else None
        after.past[self.revision] = PastRevision(self.spec, known)
        after.revision += 1
        after.spec = spec
        if self.runs:
            after.cards = spec.gpus
        else:
            # What does not run keeps the cards that it holds, which may not be those that it asks for now.
            after.holds = self.holds and (spec.gpus, spec.port) == (self.cards, self.spec.port)
        if files is not None:
            after.files = dict(files)
        return after


@dataclass
class ExpectedVolume:
    """One volume, as it must be. Its files are not part of any revision of a container: they are as they were left."""

    name: str
    # What it was given at first and by each change, in MiB; 0: it is a plain one.
    sizes: tuple[int, ...] = (0,)
    files: Files = field(default_factory=dict)
    # What the engine calls it, where somebody made it in the engine.
    adopted: str = ""

    @property
    def size_mib(self) -> int:
        """The size of now."""
        return self.sizes[-1]

    def resized(self, size_mib: int) -> ExpectedVolume:
        """After a change of size that made a revision."""
        return replace(self, sizes=(*self.sizes, size_mib), files=dict(self.files))


def containers_mounting(known: Iterable[ExpectedContainer], volume: str) -> list[str]:
    """Who mounts a volume, whether it runs or not."""
    return sorted(container.name for container in known if volume in container.spec.volumes)
