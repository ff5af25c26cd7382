"""NodeService: the node, its GPUs, its ports and its drift."""

from __future__ import annotations

from collections.abc import Iterable

from gpudock.v1 import node_service_pb2 as pb
from gpudock.v1.node_service_pb2_grpc import NodeServiceServicer
from typing_extensions import override

from gpudock_server.core.containers.service import Containers
from gpudock_server.core.nodes import HeldPort, Nodes
from gpudock_server.core.reconcile import DriftTracker
from gpudock_server.errors import ContainerNotFound, RecordUnreadable
from gpudock_server.model.claims import PortKey
from gpudock_server.rpc import list_requests, pagination
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.nodes.messages import drift_message, gpu_message, node_message
from gpudock_server.rpc.port_messages import port_claim_message, port_range_message
from gpudock_server.rpc.timestamps import timestamp

SERVICE = pb.DESCRIPTOR.services_by_name["NodeService"].full_name


class NodeService(NodeServiceServicer):
    """Serves gpudock.v1.NodeService."""

    def __init__(self, nodes: Nodes, containers: Containers, drift: DriftTracker) -> None:
        self._nodes = nodes
        self._containers = containers
        self._drift = drift

    @override
    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> pb.GetNodeResponse:
        return pb.GetNodeResponse(node=node_message(await self._nodes.get(request.name)))

    @override
    async def ListGpus(self, request: pb.ListGpusRequest, context: Context) -> pb.ListGpusResponse:
        list_request = list_requests.gpus(request)
        found, token = pagination.from_memory(list_request, await self._nodes.gpus(request.node))
        return pb.ListGpusResponse(gpus=[gpu_message(held) for held in found], next_page_token=token)

    @override
    async def ListPorts(self, request: pb.ListPortsRequest, context: Context) -> pb.ListPortsResponse:
        list_request = list_requests.ports(request)
        held = await self._nodes.ports(request.node)
        found, token = pagination.from_memory(list_request, held)
        container_ports = await self._container_ports(found)
        return pb.ListPortsResponse(
            range=port_range_message(self._nodes.port_range, (port.key for port in held)),
            ports=[port_claim_message(port, container_ports.get(port.key, 0)) for port in found],
            next_page_token=token,
        )

    @override
    async def ListDrift(self, request: pb.ListDriftRequest, context: Context) -> pb.ListDriftResponse:
        list_request = list_requests.drift(request)
        await self._nodes.check(request.node)
        report = self._drift.report
        found, token = pagination.from_memory(list_request, report.items)
        return pb.ListDriftResponse(
            drift=[drift_message(drift) for drift in found],
            next_page_token=token,
            compare_time=timestamp(report.pass_time),
            trouble=report.trouble,
            trouble_time=timestamp(report.trouble_time),
        )

    async def _container_ports(self, held: Iterable[HeldPort]) -> dict[PortKey, int]:
        """The container port of each claimed host port, from the status of its container: claims do not have it."""
        found: dict[PortKey, int] = {}
        for name in {port.holder.container for port in held}:
            try:
                view = await self._containers.get(name)
            except (ContainerNotFound, RecordUnreadable):
                # The container was deleted after the claims were read, or its record is damaged.
                continue
            for binding in view.container.status.placement.ports:
                found[PortKey(binding.protocol, binding.host_port)] = binding.container_port
        return found
