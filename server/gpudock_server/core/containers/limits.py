"""The maximum memory and number of processes of one container on this node."""

from __future__ import annotations

from gpudock_server.errors import LimitForbidden
from gpudock_server.model.engine import NodeLimits
from gpudock_server.model.spec import ContainerSpec


def check_limits(limits: NodeLimits, spec: ContainerSpec, *, previous: ContainerSpec | None = None) -> None:
    """Raise LimitForbidden for a limit above the node's maximum, unless the `previous` spec had the same limit.

    Without that exception, lowering the maximum would block all other changes of containers above it.
    """
    for field, maximum, setting in (
        ("memory_bytes", limits.max_memory_bytes, "max_memory"),
        ("pids_limit", limits.max_pids, "max_pids_limit"),
    ):
        requested = getattr(spec, field)
        if maximum and requested > maximum and (previous is None or getattr(previous, field) != requested):
            raise LimitForbidden(field=field, requested=requested, maximum=maximum, setting=setting)
