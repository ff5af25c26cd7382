"""What is to become of an engine container that is ours and that no record binds; docs/reconcile.md has the table.

Files are in it, perhaps the only ones there are. So it is removed only where it is certain that they are not: where
its operation is known to have been undone, its container known to have been deleted or to have moved on, or where it
does not say what it was made from. It is adopted where everything says that the store was put back to before it was
made. Anything else is shown, and left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from gpudock_server.core.containers.past import History
from gpudock_server.core.reconcile.scene import Heads, Labels
from gpudock_server.model.claims import ClaimKey, claim_keys
from gpudock_server.model.container import Container, Placement
from gpudock_server.model.engine import LABEL_SPEC, EngineContainer
from gpudock_server.model.names import is_name


class Fate(Enum):
    """LEFT: an operation is at work on it. NEWER, LOST: to be adopted, under a head that is older, or with none."""

    LEFT = "left"
    NEWER = "newer"
    LOST = "lost"
    REMOVED = "removed"
    REPORTED = "reported"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of it, and why."""

    one: EngineContainer
    labels: Labels
    fate: Fate
    why: str

    @property
    def uses(self) -> tuple[ClaimKey, ...]:
        """The cards and ports that it has in use as long as it runs and is not removed."""
        if self.fate is Fate.REMOVED or not self.one.running:
            return ()
        return claim_keys(Placement(gpu_uuids=self.one.gpu_uuids, ports=self.one.ports))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What there is to judge by. `unfinished` are operations, `seen` all engine containers, by id."""

    heads: Heads
    history: History
    unfinished: Collection[str]
    seen: Collection[str]

    def judge(self, unbound: Collection[EngineContainer]) -> tuple[Verdict, ...]:
        """The verdict on each of `unbound`."""
        uids = Counter(Labels.of(one).uid for one in unbound)
        names = Counter(name for name, _ in {(Labels.of(one).name, Labels.of(one).uid) for one in unbound})
        verdicts: list[Verdict] = []
        for one in unbound:
            labels = Labels.of(one)
            alone = uids[labels.uid] == 1 and names[labels.name] == 1
            fate, why = self._fate(_Case(one, labels, alone))
            verdicts.append(Verdict(one, labels, fate, why))
        return tuple(verdicts)

    def _fate(self, case: _Case) -> tuple[Fate, str]:
        labels = case.labels
        head = self.heads.views.get(labels.name)
        if labels.operation_id in self.unfinished or (head is not None and head.operation_id):
            return Fate.LEFT, "an operation is at work"
        if labels.name in self.heads.unreadable_names:
            return Fate.REPORTED, "the record of its name cannot be read"
        if labels.uid in self.history.deleted:
            return Fate.REMOVED, "its container was deleted"
        if head is None:
            return self._without_head(case)
        if head.container.uid != labels.uid:
            return self._beside_another(case)
        return self._beside_its_own(case, head.container)

    def _without_head(self, case: _Case) -> tuple[Fate, str]:
        if not case.says_its_spec:
            return Fate.REMOVED, "nobody knows it"
        if not case.alone:
            return Fate.REPORTED, "its record is lost, and there are others like it; remove all but one of them"
        if self.history.undone(case.labels.operation_id):
            return Fate.REMOVED, "its operation was undone"
        if not case.complete:
            return Fate.REPORTED, "its record is lost, and this version cannot read its labels"
        return Fate.LOST, "its record is lost"

    def _beside_another(self, case: _Case) -> tuple[Fate, str]:
        if self.history.undone(case.labels.operation_id):
            return Fate.REMOVED, "its operation was undone"
        if not case.says_its_spec:
            return Fate.REMOVED, "nobody knows it"
        name = case.labels.name
        return Fate.REPORTED, f"another container is called {name}; delete that, and this one gets its record again"

    def _beside_its_own(self, case: _Case, container: Container) -> tuple[Fate, str]:
        stands = container.engine is not None and container.engine.engine_id in self.seen
        undone = self.history.undone(case.labels.operation_id)
        if case.labels.revision <= container.revision:
            fate, why = Fate.REMOVED, f"its container is at revision {container.revision} with another"
        elif undone:
            fate, why = Fate.REMOVED, "its operation was undone"
        elif not case.says_its_spec:
            fate, why = Fate.REMOVED, "nobody knows it"
        elif stands:
            return Fate.REPORTED, "it is newer than its record, and what its record binds is there as well"
        elif not case.alone:
            return Fate.REPORTED, "it is newer than its record, and so are others; remove all but one of them"
        elif not case.complete:
            return Fate.REPORTED, "it is newer than its record, and this version cannot read its labels"
        else:
            return Fate.NEWER, "it is newer than its record"
        # Files moved between the two of them, and one is left.
        return (fate, why) if stands else (Fate.REPORTED, f"{why}, and what its record binds is gone")


@dataclass(frozen=True, slots=True)
class _Case:
    """One engine container. `alone`: no other that is unbound has its uid or its name."""

    one: EngineContainer
    labels: Labels
    alone: bool

    @property
    def says_its_spec(self) -> bool:
        return LABEL_SPEC in self.one.labels

    @property
    def complete(self) -> bool:
        """Whether all of its record can be written from it."""
        labels = self.labels
        return (
            self.one.spec is not None
            and bool(labels.uid and labels.operation_id)
            and is_name(labels.name)
            and labels.revision > 0
        )
