"""Drift: differences between the engine, the store and the running processes, and what is done about them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from gpudock_server.model.record import Record


class DriftKind(StrEnum):
    """The kind of a difference. docs/reconcile.md has the rule for each."""

    CONTAINER_GONE = "CONTAINER_GONE"
    CONTAINER_NEWER = "CONTAINER_NEWER"
    CONTAINER_UNKNOWN = "CONTAINER_UNKNOWN"
    CONTAINER_STARTED = "CONTAINER_STARTED"
    CONTAINER_RENAMED = "CONTAINER_RENAMED"
    LIMITS_CHANGED = "LIMITS_CHANGED"
    RESTART_POLICY_CHANGED = "RESTART_POLICY_CHANGED"
    RECORD_LOST = "RECORD_LOST"
    RECORD_UNREADABLE = "RECORD_UNREADABLE"
    CREATION_LOST = "CREATION_LOST"
    CLAIM_MISSING = "CLAIM_MISSING"
    CLAIM_STALE = "CLAIM_STALE"
    CLAIM_CONFLICT = "CLAIM_CONFLICT"
    LOCK_STALE = "LOCK_STALE"
    LOCK_MISSING = "LOCK_MISSING"
    OPERATION_OVERTAKEN = "OPERATION_OVERTAKEN"
    VOLUME_RECORD_LOST = "VOLUME_RECORD_LOST"
    VOLUME_UNKNOWN = "VOLUME_UNKNOWN"
    HOST_PATH_UNBOUND = "HOST_PATH_UNBOUND"
    HOST_PATH_REFUSED = "HOST_PATH_REFUSED"
    REVISION_RECORD_LOST = "REVISION_RECORD_LOST"
    SNAPSHOT_UNKNOWN = "SNAPSHOT_UNKNOWN"
    START_FAILED = "START_FAILED"


class DriftSeverity(StrEnum):
    """INFO: repaired. WARNING: will be repaired, or is harmless. ERROR: an operator must act."""

    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class DriftRemedy(StrEnum):
    """What is done about a difference.

    REPAIRED: it was repaired. PENDING: it will be repaired, at a time or by an operation. RETRIED: the repair failed
    and is retried in every pass. REPORTED: no repair is certain to be right, so nothing is done.
    """

    REPAIRED = "REPAIRED"
    PENDING = "PENDING"
    RETRIED = "RETRIED"
    REPORTED = "REPORTED"


_SEVERITY = {
    DriftRemedy.REPAIRED: DriftSeverity.INFO,
    DriftRemedy.PENDING: DriftSeverity.WARNING,
    DriftRemedy.RETRIED: DriftSeverity.WARNING,
    DriftRemedy.REPORTED: DriftSeverity.ERROR,
}


class Drift(Record):
    """One difference.

    `container` and `uid`, or `volume` and `uid`, name the object. `claim` is the UUID of a GPU, or a port as
    `tcp/8080`; `other` names another container that is involved; `key` is a key of the store. `expected` and `actual`
    are the two sides in a few words, `message` describes the difference in a sentence, `plan` says what is done and
    when. `due_time` is the time of the repair if it is not immediate.
    """

    kind: DriftKind
    remedy: DriftRemedy
    container: str = ""
    uid: str = ""
    engine_id: str = ""
    engine_name: str = ""
    claim: str = ""
    operation_id: str = ""
    other: str = ""
    key: str = ""
    expected: str = ""
    actual: str = ""
    message: str
    plan: str
    since: datetime | None = None
    due_time: datetime | None = None
    volume: str = ""

    @property
    def severity(self) -> DriftSeverity:
        """Return the severity, which follows from the remedy."""
        return _SEVERITY[self.remedy]

    @property
    def identity(self) -> tuple[str, ...]:
        """Return the identity of the difference, which is the same when it is found again."""
        return (
            self.kind,
            self.container,
            self.uid,
            self.engine_id,
            self.claim,
            self.operation_id,
            self.key,
            self.volume,
        )


class DriftReport(Record):
    """The findings of the last complete reconcile pass, and those since.

    `trouble` is why the latest pass was aborted, and `trouble_time` when; `items` are then those of the pass before.
    `pass_time` is None until the first pass has ended.
    """

    items: tuple[Drift, ...] = ()
    pass_time: datetime | None = None
    trouble: str = ""
    trouble_time: datetime | None = None
