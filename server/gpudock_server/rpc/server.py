"""Builds the gRPC server: services, middleware, options, health, reflection and channelz.

`rpc.listeners` binds its addresses, before `RpcServer.grpc` is started.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc.aio
from gpudock.v1 import error_reason_pb2
from gpudock.v1.container_service_pb2_grpc import add_ContainerServiceServicer_to_server
from gpudock.v1.node_service_pb2_grpc import add_NodeServiceServicer_to_server
from gpudock.v1.operation_service_pb2_grpc import add_OperationServiceServicer_to_server
from gpudock.v1.volume_service_pb2_grpc import add_VolumeServiceServicer_to_server
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gpudock_server.core.containers.service import Containers
from gpudock_server.core.exec.sessions import ExecSessions
from gpudock_server.core.nodes import Nodes
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.reconcile import DriftTracker
from gpudock_server.core.volumes.service import Volumes
from gpudock_server.core.watches import Watches
from gpudock_server.rpc.containers import service as container_service
from gpudock_server.rpc.containers.service import ContainerService
from gpudock_server.rpc.health import HealthService
from gpudock_server.rpc.listeners import SERVER_OPTIONS
from gpudock_server.rpc.middleware.audit import AuditInterceptor
from gpudock_server.rpc.middleware.bearer_tokens import TokenFile
from gpudock_server.rpc.middleware.decoding import DecodingInterceptor
from gpudock_server.rpc.middleware.disconnect import DisconnectInterceptor
from gpudock_server.rpc.middleware.errors import ErrorInterceptor
from gpudock_server.rpc.middleware.identity import IdentityInterceptor
from gpudock_server.rpc.middleware.interceptor import Interceptor
from gpudock_server.rpc.nodes import service as node_service
from gpudock_server.rpc.nodes.service import NodeService
from gpudock_server.rpc.operations import service as operation_service
from gpudock_server.rpc.operations.service import OperationService
from gpudock_server.rpc.volumes import service as volume_service
from gpudock_server.rpc.volumes.service import VolumeService
from gpudock_server.settings.definitions import Settings

GPUDOCK_SERVICES = (
    container_service.SERVICE,
    volume_service.SERVICE,
    operation_service.SERVICE,
    node_service.SERVICE,
)
_STANDARD_SERVICES = (
    health.SERVICE_NAME,
    reflection.SERVICE_NAME,
    channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
)
# No other module imports the reasons; importing them here makes them available to reflection.
_REASONS = error_reason_pb2.DESCRIPTOR

_MIB = 1024 * 1024
_SECOND_MS = 1000
_MOST_AGE_SECONDS = 3600.0
_MOST_IDLE_SECONDS = 300.0

_OPTIONS = (
    *SERVER_OPTIONS,
    # A message of stdin has at most 1 MiB, a spec less. gRPC refuses a larger message when it reads its header.
    ("grpc.max_receive_message_length", _MIB + _MIB // 4),
    # Frames of up to 1 MiB instead of 16 KiB carry an eighth more data in the same time.
    ("grpc.http2.max_frame_size", _MIB),
    # A watch can be idle for hours, and firewalls drop idle connections sooner. A caller that does not answer a ping
    # within 20 seconds is gone, and its exec sessions end.
    ("grpc.keepalive_time_ms", 30 * _SECOND_MS),
    ("grpc.keepalive_timeout_ms", 20 * _SECOND_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # Callers may send pings too; by default, more than one in five minutes counts as an attack.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10 * _SECOND_MS),
    ("grpc.enable_channelz", 1),
    # More than max_execs, so that one connection can use all exec sessions.
    ("grpc.max_concurrent_streams", 1024),
    # Flow control windows stay at 64 KiB. With the probe they grow with the speed of the network, and a request of
    # 4 MiB would be in memory as a whole, for each connection, before it is refused.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.server_handshake_timeout_ms", 20 * _SECOND_MS),
)


def connection_options(
    *, age_seconds: float = _MOST_AGE_SECONDS, idle_seconds: float = _MOST_IDLE_SECONDS
) -> tuple[tuple[str, int], ...]:
    """The options of the server's connections, for grpc.aio.server(options=…).

    After `age_seconds` a connection takes no new calls, so its caller connects again and presents its certificate
    again; calls in progress continue, however long they take. After `idle_seconds` without a call it is closed.
    """
    return (
        *_OPTIONS,
        # grpc.max_connection_age_grace_ms is not set: calls in an old connection have no time limit.
        ("grpc.max_connection_age_ms", round(age_seconds * _SECOND_MS)),
        ("grpc.max_connection_idle_ms", round(idle_seconds * _SECOND_MS)),
    )


@dataclass(frozen=True, slots=True)
class Services:
    """The use cases of core that the server exposes."""

    containers: Containers
    volumes: Volumes
    operations: Operations
    execs: ExecSessions
    nodes: Nodes
    watches: Watches
    drift: DriftTracker


class RpcServer:
    """The gRPC server. Bind addresses to `grpc`, then start it."""

    def __init__(self, services: Services, middleware: tuple[Interceptor, ...]) -> None:
        """`middleware` is outermost first, as `interceptors` returns it."""
        self.grpc = grpc.aio.server(interceptors=middleware, options=connection_options())
        self._health = HealthService()
        add_ContainerServiceServicer_to_server(
            ContainerService(services.containers, services.operations, services.execs, services.watches), self.grpc
        )
        add_VolumeServiceServicer_to_server(
            VolumeService(services.volumes, services.operations, services.watches), self.grpc
        )
        add_OperationServiceServicer_to_server(OperationService(services.operations), self.grpc)
        add_NodeServiceServicer_to_server(NodeService(services.nodes, services.containers, services.drift), self.grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        channelz.add_channelz_servicer(self.grpc)  # type: ignore[arg-type]  # its stubs know no asyncio
        reflection.enable_server_reflection((*GPUDOCK_SERVICES, *_STANDARD_SERVICES), self.grpc)

    async def set_serving(self, serving: bool, *, services: tuple[str, ...] = GPUDOCK_SERVICES) -> None:  # noqa: FBT001 - the value of a setter
        """Set the health of `services` and of the server as a whole (named "").

        Call it before the server is started: the initial status of the whole is SERVING.
        """
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        # The whole comes last: a watcher of it then finds the services in the same status.
        for service in (*services, ""):
            self._health.set(service, status)


def interceptors(tokens: TokenFile | None) -> tuple[Interceptor, ...]:
    """The middleware of every call, outermost first.

    Audit is inside of errors, to see exceptions before they become a status, and outside of identity, to log refused
    callers. Decoding is innermost, so that all others see the errors that it raises.
    """
    return (
        ErrorInterceptor(),
        AuditInterceptor(),
        IdentityInterceptor(tokens),
        DisconnectInterceptor(),
        DecodingInterceptor(),
    )


def build_server(services: Services, settings: Settings) -> RpcServer:
    """The server for `settings`. Raises StartupError if the token file cannot be read."""
    tokens = TokenFile(settings.token_file) if settings.token_file is not None else None
    return RpcServer(services, interceptors(tokens))
