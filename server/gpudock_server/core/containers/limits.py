"""What one container may use at most on this node."""

from __future__ import annotations

from gpudock_server.errors import LimitForbidden
from gpudock_server.model.engine import NodeLimits
from gpudock_server.model.spec import ContainerSpec


def check_limits(limits: NodeLimits, spec: ContainerSpec, *, had: ContainerSpec | None = None) -> None:
    """Raise LimitForbidden for a limit above the node's maximum, unless the container `had` the same limit before.

    Without that exception a maximum that was lowered would stop every other change of the containers above it.
    """
    for field, maximum, setting in (
        ("memory_bytes", limits.max_memory_bytes, "max_memory"),
        ("pids_limit", limits.max_pids, "max_pids_limit"),
    ):
        requested = getattr(spec, field)
        if maximum and requested > maximum and (had is None or getattr(had, field) != requested):
            raise LimitForbidden(field=field, requested=requested, maximum=maximum, setting=setting)
