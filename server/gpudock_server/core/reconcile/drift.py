"""Keeps the drift that reconcile found, and since when each exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from gpudock_server.errors import GpudockError
from gpudock_server.model.drift import Drift, DriftRemedy, DriftReport
from gpudock_server.model.record import now

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

ReportDrift = Callable[[Drift], None]


class DriftTracker:
    """The drift found by the last full pass, and by events since then."""

    def __init__(self) -> None:
        self._report = DriftReport()

    @property
    def report(self) -> DriftReport:
        """All drift, ordered by container and kind."""
        items = sorted(self._report.items, key=lambda drift: (drift.container, drift.kind, drift.identity))
        return self._report.model_copy(update={"items": tuple(items)})

    def report_drift(self, drift: Drift) -> None:
        """Add drift that an event led to; it is kept until the end of the next full pass."""
        others = tuple(item for item in self._report.items if item.identity != drift.identity)
        self._report = self._report.model_copy(update={"items": (*others, self._with_time(drift))})

    @contextmanager
    def full_pass(self) -> Iterator[ReportDrift]:
        """Collect the drift of a full pass, which replaces all other drift when the pass succeeds.

        An aborted pass leaves the drift as it was, and sets `trouble` of the report.
        """
        found: dict[tuple[str, ...], Drift] = {}

        def report_drift(drift: Drift) -> None:
            found[drift.identity] = self._with_time(drift)

        try:
            yield report_drift
        except GpudockError as error:
            self._report = self._report.model_copy(update={"trouble": error.message, "trouble_time": now()})
            raise
        self._report = DriftReport(items=tuple(found.values()), pass_time=now())

    def _with_time(self, drift: Drift) -> Drift:
        before = next((item for item in self._report.items if item.identity == drift.identity), None)
        if before is None or before.remedy is DriftRemedy.REPAIRED:
            log.warning("drift found", found=drift.kind.value, detail=drift.message, plan=drift.plan)
            return drift.model_copy(update={"since": now()})
        return drift.model_copy(update={"since": before.since})
