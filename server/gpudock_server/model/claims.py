"""Claims: which container holds which GPU and which port of a host.

The value of a claim names its holder. GPUs are keyed by host and UUID, ports by host, protocol and number. The key
contains the host and not the node, so that two daemons on one host cannot allocate the same GPU or port.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpudock_server.model.container import Placement
from gpudock_server.model.record import Record
from gpudock_server.model.spec import Protocol


class Holder(Record):
    """The container that holds a claim. `operation_id` is set until the operation that took the claim has committed."""

    container: str
    uid: str
    node: str
    operation_id: str = ""


# The holder of a claim whose value cannot be read. The claim is held: it must not be allocated again.
UNREADABLE_HOLDER = Holder(container="(unreadable)", uid="", node="")


@dataclass(frozen=True, slots=True, order=True)
class GpuKey:
    """A GPU of a host."""

    uuid: str


@dataclass(frozen=True, slots=True, order=True)
class PortKey:
    """A port of a host."""

    protocol: Protocol
    port: int


ClaimKey = GpuKey | PortKey


def claim_keys(placement: Placement) -> tuple[ClaimKey, ...]:
    """Return the keys of the claims that `placement` needs."""
    return (
        *(GpuKey(uuid) for uuid in placement.gpu_uuids),
        *(PortKey(binding.protocol, binding.host_port) for binding in placement.ports),
    )


@dataclass(frozen=True, slots=True)
class ClaimTable:
    """All claims of one host, from one consistent read."""

    claims: Mapping[ClaimKey, Holder] = field(default_factory=dict)

    def holder(self, key: ClaimKey) -> Holder | None:
        """Return the holder of `key`; None if it is free."""
        return self.claims.get(key)

    def claims_of_container(self, uid: str) -> tuple[ClaimKey, ...]:
        """Return the claims that the container `uid` holds."""
        return tuple(key for key, holder in self.claims.items() if holder.uid == uid)
