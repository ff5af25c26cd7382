"""The host and the daemon on it."""

from __future__ import annotations

from datetime import datetime

from gpudock_server.model.record import Record


class NodeRecord(Record):
    """A daemon's sign of life; it goes with its lease.

    `boot_id`, `pid` and `start_ticks` name the process, so that a daemon started again on the same host need not wait
    for the lease of one that was killed.
    """

    node: str
    host: str
    address: str
    version: str
    engine_id: str
    boot_id: str
    pid: int
    start_ticks: int
    start_time: datetime
