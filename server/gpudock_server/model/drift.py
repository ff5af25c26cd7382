"""Drift: where the engine, the store and what runs do not agree, and what is done about it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from gpudock_server.model.record import Record


class DriftKind(StrEnum):
    """What does not agree. docs/reconcile.md has the rule of each."""

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
    """INFO: put right. WARNING: will be put right, or harms nobody. ERROR: needs a person."""

    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class DriftRemedy(StrEnum):
    """What is done about it.

    REPAIRED: it has been put right. PENDING: it will be, at a time or by an operation. RETRIED: putting it right failed
    and is tried at every pass. REPORTED: no rule is certain enough, so nothing is done.
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
    """One thing that does not agree.

    `container` and `uid` are whose it is, or `volume` and `uid`. `claim` is a card's UUID or a port as `tcp/8080`,
    `other` names another container that is part of it, `key` a key of the store. `expected` and `actual` are the two
    sides in a few words, `message` is the whole in a sentence, `plan` what is done and when. `due_time` is when, where
    it is not at once.
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
        """How much it asks of a person."""
        return _SEVERITY[self.remedy]

    @property
    def identity(self) -> tuple[str, ...]:
        """Names the finding: the same one, found again, has the same identity."""
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
    """What the last full comparison found, and what was noticed since.

    `trouble` is why the latest attempt at one was broken off, and `trouble_time` when: `items` are then of the one
    before it. `pass_time` is None until the first has ended.
    """

    items: tuple[Drift, ...] = ()
    pass_time: datetime | None = None
    trouble: str = ""
    trouble_time: datetime | None = None
