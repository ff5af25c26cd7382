"""Keeps what was found, and since when."""

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
    """The findings of the last full pass, and those of events since then."""

    def __init__(self) -> None:
        self._report = DriftReport()

    @property
    def report(self) -> DriftReport:
        """What there is, by container and kind."""
        items = sorted(self._report.items, key=lambda one: (one.container, one.kind, one.identity))
        return self._report.model_copy(update={"items": tuple(items)})

    def report_drift(self, found: Drift) -> None:
        """Add what an event led to; it stays until the next full pass has ended."""
        others = tuple(one for one in self._report.items if one.identity != found.identity)
        self._report = self._report.model_copy(update={"items": (*others, self._with_time(found))})

    @contextmanager
    def full_pass(self) -> Iterator[ReportDrift]:
        """Collect the findings of a pass, which replace all others when it ends well.

        A pass that is broken off leaves the findings as they were, and says so.
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
        before = next((one for one in self._report.items if one.identity == drift.identity), None)
        if before is None or before.remedy is DriftRemedy.REPAIRED:
            log.warning("drift", found=drift.kind.value, detail=drift.message, plan=drift.plan)
            return drift.model_copy(update={"since": now()})
        return drift.model_copy(update={"since": before.since})
