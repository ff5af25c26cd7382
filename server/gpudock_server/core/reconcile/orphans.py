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

from gpudock_server.core.containers.operation_history import OperationHistory
from gpudock_server.core.reconcile.records import ContainerRecords, EngineContainerLabels
from gpudock_server.model.claims import ClaimKey, claim_keys
from gpudock_server.model.container import Container, Placement
from gpudock_server.model.engine import LABEL_SPEC, EngineContainer
from gpudock_server.model.names import is_name


class OrphanAction(Enum):
    """LEFT: an operation is at work on it. NEWER, LOST: to be adopted, under a head that is older, or with none."""

    LEFT = "left"
    NEWER = "newer"
    LOST = "lost"
    REMOVED = "removed"
    REPORTED = "reported"


@dataclass(frozen=True, slots=True)
class Orphan:
    """What is to become of it, and why."""

    one: EngineContainer
    labels: EngineContainerLabels
    action: OrphanAction
    why: str

    @property
    def uses(self) -> tuple[ClaimKey, ...]:
        """The cards and ports that it has in use as long as it runs and is not removed."""
        if self.action is OrphanAction.REMOVED or not self.one.running:
            return ()
        return claim_keys(Placement(gpu_uuids=self.one.gpu_uuids, ports=self.one.ports))


@dataclass(frozen=True, slots=True)
class OrphanClassifier:
    """What there is to judge by. `unfinished` are operations, `seen` all engine containers, by id."""

    records: ContainerRecords
    history: OperationHistory
    unfinished: Collection[str]
    seen: Collection[str]

    def classify(self, unbound: Collection[EngineContainer]) -> tuple[Orphan, ...]:
        """The verdict on each of `unbound`."""
        uids = Counter(EngineContainerLabels.of(one).uid for one in unbound)
        names = Counter(
            name
            for name, _ in {(EngineContainerLabels.of(one).name, EngineContainerLabels.of(one).uid) for one in unbound}
        )
        orphans: list[Orphan] = []
        for one in unbound:
            labels = EngineContainerLabels.of(one)
            alone = uids[labels.uid] == 1 and names[labels.name] == 1
            action, why = self._action(_Candidate(one, labels, alone))
            orphans.append(Orphan(one, labels, action, why))
        return tuple(orphans)

    def _action(self, candidate: _Candidate) -> tuple[OrphanAction, str]:
        labels = candidate.labels
        head = self.records.views.get(labels.name)
        if labels.operation_id in self.unfinished or (head is not None and head.operation_id):
            return OrphanAction.LEFT, "an operation is at work"
        if labels.name in self.records.unreadable_names:
            return OrphanAction.REPORTED, "the record of its name cannot be read"
        if labels.uid in self.history.deleted:
            return OrphanAction.REMOVED, "its container was deleted"
        if head is None:
            return self._without_record(candidate)
        if head.container.uid != labels.uid:
            return self._with_record_of_another(candidate)
        return self._with_older_record(candidate, head.container)

    def _without_record(self, candidate: _Candidate) -> tuple[OrphanAction, str]:
        if not candidate.has_spec_label:
            return OrphanAction.REMOVED, "nobody knows it"
        if not candidate.alone:
            return OrphanAction.REPORTED, "its record is lost, and there are others like it; remove all but one of them"
        if self.history.was_undone(candidate.labels.operation_id):
            return OrphanAction.REMOVED, "its operation was undone"
        if not candidate.complete:
            return OrphanAction.REPORTED, "its record is lost, and this version cannot read its labels"
        return OrphanAction.LOST, "its record is lost"

    def _with_record_of_another(self, candidate: _Candidate) -> tuple[OrphanAction, str]:
        if self.history.was_undone(candidate.labels.operation_id):
            return OrphanAction.REMOVED, "its operation was undone"
        if not candidate.has_spec_label:
            return OrphanAction.REMOVED, "nobody knows it"
        name = candidate.labels.name
        return (
            OrphanAction.REPORTED,
            f"another container is called {name}; delete that, and this one gets its record again",
        )

    def _with_older_record(self, candidate: _Candidate, container: Container) -> tuple[OrphanAction, str]:
        stands = container.engine is not None and container.engine.engine_id in self.seen
        undone = self.history.was_undone(candidate.labels.operation_id)
        if candidate.labels.revision <= container.revision:
            action, why = OrphanAction.REMOVED, f"its container is at revision {container.revision} with another"
        elif undone:
            action, why = OrphanAction.REMOVED, "its operation was undone"
        elif not candidate.has_spec_label:
            action, why = OrphanAction.REMOVED, "nobody knows it"
        elif stands:
            return OrphanAction.REPORTED, "it is newer than its record, and what its record binds is there as well"
        elif not candidate.alone:
            return OrphanAction.REPORTED, "it is newer than its record, and so are others; remove all but one of them"
        elif not candidate.complete:
            return OrphanAction.REPORTED, "it is newer than its record, and this version cannot read its labels"
        else:
            return OrphanAction.NEWER, "it is newer than its record"
        # Files moved between the two of them, and one is left.
        return (action, why) if stands else (OrphanAction.REPORTED, f"{why}, and what its record binds is gone")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One engine container. `alone`: no other that is unbound has its uid or its name."""

    one: EngineContainer
    labels: EngineContainerLabels
    alone: bool

    @property
    def has_spec_label(self) -> bool:
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
