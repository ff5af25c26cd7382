"""Converts ports: protocols, bindings, claims, and the port range of a node."""

from __future__ import annotations

from collections.abc import Iterable

from gpudock.v1 import port_claim_pb2, port_pb2

from gpudock_server.core.nodes import HeldPort
from gpudock_server.model.claims import PortKey
from gpudock_server.model.container import PortBinding
from gpudock_server.model.spec import Protocol

PROTOCOLS = {protocol: port_pb2.PortProtocol.Value(f"PORT_PROTOCOL_{protocol.name}") for protocol in Protocol}


def port_binding_message(port: PortBinding) -> port_pb2.PortBinding:
    """A port that is published or planned."""
    return port_pb2.PortBinding(
        container_port=port.container_port, protocol=PROTOCOLS[port.protocol], host_port=port.host_port
    )


def port_range_message(bounds: tuple[int, int], claimed: Iterable[PortKey]) -> port_pb2.PortRange:
    """The range that host ports are chosen from, both ends included, and how much of it is free."""
    first, last = bounds
    keys = tuple(claimed)

    def free(protocol: Protocol) -> int:
        return last - first + 1 - sum(key.protocol is protocol and first <= key.port <= last for key in keys)

    return port_pb2.PortRange(
        first_port=first,
        last_port=last,
        free_tcp_ports=free(Protocol.TCP),
        free_udp_ports=free(Protocol.UDP),
        claimed_ports=len(keys),
    )


def port_claim_message(held: HeldPort, container_port: int) -> port_claim_pb2.PortClaim:
    """A claimed port; `container_port` is 0 if its container does not publish it yet."""
    return port_claim_pb2.PortClaim(
        host_port=held.key.port,
        protocol=PROTOCOLS[held.key.protocol],
        container=held.holder.container,
        container_uid=held.holder.uid,
        container_port=container_port,
        operation_id=held.holder.operation_id,
    )
