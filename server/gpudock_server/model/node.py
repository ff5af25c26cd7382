"""The record of a node."""

from __future__ import annotations

from datetime import datetime

from gpudock_server.model.record import Record


class NodeRecord(Record):
    """Node heartbeat record; it is deleted when the lease of its daemon expires.

    `boot_id`, `pid` and `start_ticks` identify the process, so that a daemon that is started again on the same host
    need not wait for the lease of a daemon that was killed.
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
