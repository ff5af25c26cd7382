"""Decides what to do with an orphan: an engine container that gpudock created and that no record binds.

An orphan may have the only copy of a user's files. So it is removed only where it certainly has not: where its
operation is known to have been undone, where its container is known to have been deleted or to have a newer engine
container, or where it has no spec label. It is adopted where everything shows that the store was restored to a state
before its creation. Any other orphan is reported and kept. docs/reconcile.md has the table of these rules.
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
    """What to do with an orphan.

    LEFT: nothing, an operation is in progress. NEWER: adopt it into its older record. LOST: adopt it with a new record.
    """

    LEFT = "left"
    NEWER = "newer"
    LOST = "lost"
    REMOVED = "removed"
    REPORTED = "reported"


@dataclass(frozen=True, slots=True)
class Orphan:
    """An engine container that no record binds, with the action for it and the reason."""

    engine_container: EngineContainer
    labels: EngineContainerLabels
    action: OrphanAction
    reason: str

    @property
    def uses(self) -> tuple[ClaimKey, ...]:
        """The GPUs and ports that the orphan uses; none where it does not run or is to be removed."""
        if self.action is OrphanAction.REMOVED or not self.engine_container.running:
            return ()
        return claim_keys(Placement(gpu_uuids=self.engine_container.gpu_uuids, ports=self.engine_container.ports))


@dataclass(frozen=True, slots=True)
class OrphanClassifier:
    """Classifies orphans. `unfinished` are ids of operations, `existing` ids of all engine containers."""

    records: ContainerRecords
    history: OperationHistory
    unfinished: Collection[str]
    existing: Collection[str]

    def classify(self, unbound: Collection[EngineContainer]) -> tuple[Orphan, ...]:
        """Classify the engine containers that no record binds."""
        all_labels = [EngineContainerLabels.of(engine_container) for engine_container in unbound]
        uids = Counter(labels.uid for labels in all_labels)
        names = Counter(name for name, _ in {(labels.name, labels.uid) for labels in all_labels})
        orphans: list[Orphan] = []
        for engine_container, labels in zip(unbound, all_labels, strict=True):
            unique = uids[labels.uid] == 1 and names[labels.name] == 1
            action, reason = self._action(_Candidate(engine_container, labels, unique))
            orphans.append(Orphan(engine_container, labels, action, reason))
        return tuple(orphans)

    def _action(self, candidate: _Candidate) -> tuple[OrphanAction, str]:
        labels = candidate.labels
        view = self.records.views.get(labels.name)
        if labels.operation_id in self.unfinished or (view is not None and view.operation_id):
            return OrphanAction.LEFT, "operation in progress"
        if labels.name in self.records.unreadable_names:
            return OrphanAction.REPORTED, "the record of that name is unreadable"
        if labels.uid in self.history.deleted:
            return OrphanAction.REMOVED, "its container was deleted"
        if view is None:
            return self._without_record(candidate)
        if view.container.uid != labels.uid:
            return self._with_record_of_another(candidate)
        return self._with_older_record(candidate, view.container)

    def _without_record(self, candidate: _Candidate) -> tuple[OrphanAction, str]:
        if not candidate.has_spec_label:
            return OrphanAction.REMOVED, "no spec label"
        if not candidate.unique:
            return OrphanAction.REPORTED, "record lost, and there are several candidates; remove all but one"
        if self.history.was_undone(candidate.labels.operation_id):
            return OrphanAction.REMOVED, "its operation was undone"
        if not candidate.complete:
            return OrphanAction.REPORTED, "record lost, and this version cannot read the labels"
        return OrphanAction.LOST, "record lost"

    def _with_record_of_another(self, candidate: _Candidate) -> tuple[OrphanAction, str]:
        if self.history.was_undone(candidate.labels.operation_id):
            return OrphanAction.REMOVED, "its operation was undone"
        if not candidate.has_spec_label:
            return OrphanAction.REMOVED, "no spec label"
        name = candidate.labels.name
        return OrphanAction.REPORTED, f"the name {name} is taken; delete that container to have this one adopted"

    def _with_older_record(self, candidate: _Candidate, container: Container) -> tuple[OrphanAction, str]:
        bound_exists = container.engine is not None and container.engine.engine_id in self.existing
        undone = self.history.was_undone(candidate.labels.operation_id)
        if candidate.labels.revision <= container.revision:
            action, reason = OrphanAction.REMOVED, f"replaced: its container is at revision {container.revision}"
        elif undone:
            action, reason = OrphanAction.REMOVED, "its operation was undone"
        elif not candidate.has_spec_label:
            action, reason = OrphanAction.REMOVED, "no spec label"
        elif bound_exists:
            return OrphanAction.REPORTED, "newer than its record, whose engine container still exists"
        elif not candidate.unique:
            return OrphanAction.REPORTED, "newer than its record, and there are several candidates; remove all but one"
        elif not candidate.complete:
            return OrphanAction.REPORTED, "newer than its record, and this version cannot read the labels"
        else:
            return OrphanAction.NEWER, "newer than its record"
        if bound_exists:
            return action, reason
        # A change moves files between two engine containers, and only this one of them is left.
        return OrphanAction.REPORTED, f"{reason}, and the engine container of its record is gone"


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An engine container to classify. `unique`: no other unbound one has its uid, or its name with another uid."""

    engine_container: EngineContainer
    labels: EngineContainerLabels
    unique: bool

    @property
    def has_spec_label(self) -> bool:
        return LABEL_SPEC in self.engine_container.labels

    @property
    def complete(self) -> bool:
        """Whether the labels suffice to write the record."""
        labels = self.labels
        return (
            self.engine_container.spec is not None
            and bool(labels.uid and labels.operation_id)
            and is_name(labels.name)
            and labels.revision > 0
        )
