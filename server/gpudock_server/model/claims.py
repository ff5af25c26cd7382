"""Claims: which container holds which card and which port of a host.

A claim exists or it does not; its value names the holder. Cards are keyed by host and UUID, ports by host, protocol
and number, so that two daemons on one host can never give one thing away twice, whatever their nodes are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpudock_server.model.container import Placement
from gpudock_server.model.record import Record
from gpudock_server.model.spec import Protocol


class Holder(Record):
    """Who holds a claim. `operation_id` is set while the operation that took it has not committed."""

    container: str
    uid: str
    node: str
    operation_id: str = ""


# Stands for the holder of a claim whose value cannot be read. It is held: it must not be given to anybody.
UNREADABLE_HOLDER = Holder(container="(unreadable)", uid="", node="")


@dataclass(frozen=True, slots=True, order=True)
class GpuKey:
    """A card of a host."""

    uuid: str


@dataclass(frozen=True, slots=True, order=True)
class PortKey:
    """A port of a host."""

    protocol: Protocol
    port: int


ClaimKey = GpuKey | PortKey


def claim_keys(placement: Placement) -> tuple[ClaimKey, ...]:
    """The claims that `placement` needs."""
    return (
        *(GpuKey(uuid) for uuid in placement.gpu_uuids),
        *(PortKey(binding.protocol, binding.host_port) for binding in placement.ports),
    )


@dataclass(frozen=True, slots=True)
class ClaimTable:
    """All claims of one host, read at one moment."""

    claims: Mapping[ClaimKey, Holder] = field(default_factory=dict)

    def holder(self, key: ClaimKey) -> Holder | None:
        """Who holds `key`; None when it is free."""
        return self.claims.get(key)

    def claims_of_container(self, uid: str) -> tuple[ClaimKey, ...]:
        """Everything that the container `uid` holds."""
        return tuple(key for key, holder in self.claims.items() if holder.uid == uid)

    def claims_of_operation(self, operation_id: str) -> tuple[ClaimKey, ...]:
        """Everything that an operation took and has not committed."""
        return tuple(key for key, holder in self.claims.items() if holder.operation_id == operation_id)
