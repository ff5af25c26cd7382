"""Nodes: capacity, GPUs, ports and drift."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc.aio

from gpudock._calls import Calls
from gpudock._enums import enum_value
from gpudock._pages import Pages
from gpudock.v1 import node_service_pb2 as pb
from gpudock.v1.drift_pb2 import Drift, DriftKind, DriftSeverity
from gpudock.v1.gpu_pb2 import Gpu, GpuHealth
from gpudock.v1.node_pb2 import Node
from gpudock.v1.node_service_pb2_grpc import NodeServiceStub
from gpudock.v1.port_claim_pb2 import PortClaim
from gpudock.v1.port_pb2 import PortProtocol


@dataclass(frozen=True, slots=True)
class Comparison:
    """The last comparison of engine and records: its time (None: never) and the error of the latest attempt, if any."""

    compare_time: datetime | None
    trouble: str


class Nodes:
    """The node of the daemon, or another node of the installation by name."""

    def __init__(self, calls: Calls, channel: grpc.aio.Channel) -> None:
        self._calls = calls
        self._stub = NodeServiceStub(channel)

    async def get(self, name: str = "") -> Node:
        """Return a node: versions, capacity, free resources and the health of its components."""
        return (await self._calls.read(self._stub.GetNode, pb.GetNodeRequest(name=name))).node

    def gpus(
        self,
        *,
        healths: Iterable[str] = (),
        model: str = "",
        claimed: bool | None = None,
        container: str = "",
        node: str = "",
        page_size: int = 0,
    ) -> Pages[Gpu]:
        """List GPUs by index, with their current measurements and the containers that hold them.

        Filters: in any of `healths` (such as `healthy`), with `model` in their name, held or not held (`claimed`), held
        by `container`.
        """
        filters = pb.GpuFilter(
            healths=[enum_value(GpuHealth, health) for health in healths],
            model=model,
            claimed=claimed,
            container=container,
        )
        request = pb.ListGpusRequest(node=node, page_size=page_size, filter=filters)
        return Pages(self._calls, self._stub.ListGpus, request, lambda answer: answer.gpus)

    def ports(
        self, *, protocols: Iterable[str] = (), container: str = "", node: str = "", page_size: int = 0
    ) -> Pages[PortClaim]:
        """List the host ports that containers hold, by number; `get().ports` has their range."""
        filters = pb.PortFilter(
            protocols=[enum_value(PortProtocol, protocol) for protocol in protocols], container=container
        )
        request = pb.ListPortsRequest(node=node, page_size=page_size, filter=filters)
        return Pages(self._calls, self._stub.ListPorts, request, lambda answer: answer.ports)

    def drift(
        self,
        *,
        kinds: Iterable[str] = (),
        severities: Iterable[str] = (),
        container: str = "",
        node: str = "",
        page_size: int = 0,
    ) -> Pages[Drift]:
        """List differences between engine, store and processes: what differs, since when, and the remedy.

        The list is that of the last complete comparison; `comparison` returns its time and a later failure.
        """
        filters = pb.DriftFilter(
            kinds=[enum_value(DriftKind, kind) for kind in kinds],
            severities=[enum_value(DriftSeverity, severity) for severity in severities],
            container=container,
        )
        request = pb.ListDriftRequest(node=node, page_size=page_size, filter=filters)
        return Pages(self._calls, self._stub.ListDrift, request, lambda answer: answer.drift)

    async def comparison(self, node: str = "") -> Comparison:
        """Return when engine and store were last compared, and why a later comparison failed."""
        answer = await self._calls.read(self._stub.ListDrift, pb.ListDriftRequest(node=node, page_size=1))
        return Comparison(
            compare_time=answer.compare_time.ToDatetime(UTC) if answer.HasField("compare_time") else None,
            trouble=answer.trouble,
        )
