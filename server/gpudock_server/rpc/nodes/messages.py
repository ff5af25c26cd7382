"""The node: what it has, what is left, and how its parts are."""

from __future__ import annotations

from collections.abc import Iterator

from gpudock.v1 import node_pb2

from gpudock_server.core.nodes import NodeView
from gpudock_server.model.claims import PortKey
from gpudock_server.rpc.operations.messages import LAYER_TRANSFER_METHODS
from gpudock_server.rpc.port_messages import port_range_message
from gpudock_server.rpc.timestamps import timestamp


def node_message(seen: NodeView) -> node_pb2.Node:
    """A node at one moment; what did not answer is absent, and `components` says why."""
    engine = seen.engine
    return node_pb2.Node(
        name=seen.name,
        daemon_version=seen.version,
        engine=node_pb2.EngineInfo(
            id=engine.id,
            version=engine.version,
            api_version=engine.api_version,
            storage_driver=engine.storage_driver,
        )
        if engine
        else None,
        etcd_version=seen.store_version,
        driver_version=seen.gpus.driver_version,
        nvml_version=seen.gpus.nvml_version,
        cuda_driver_version=seen.gpus.cuda_driver_version,
        capacity=node_pb2.NodeCapacity(
            gpus=len(seen.gpus.gpus),
            cpus=engine.cpus if engine else 0,
            memory_bytes=engine.memory_bytes if engine else 0,
        ),
        free_gpus=seen.free_gpus,
        claimed_gpus=seen.claimed_gpus,
        memory_available_bytes=seen.memory_available_bytes,
        ports=port_range_message(seen.port_range, (key for key in seen.claims.claims if isinstance(key, PortKey))),
        disk=node_pb2.DiskUsage(path=seen.disk.path, total_bytes=seen.disk.total_bytes, free_bytes=seen.disk.free_bytes)
        if seen.disk
        else None,
        layer_carry=[
            node_pb2.LayerCarrySupport(method=LAYER_TRANSFER_METHODS[method], available=not reason, reason=reason)
            for method, reason in seen.carry_methods
        ],
        volume_pool=node_pb2.VolumePool(
            path=seen.volume_pool.path,
            total_bytes=seen.volume_pool.usage.total_bytes,
            free_bytes=seen.volume_pool.usage.free_bytes,
            promised_bytes=seen.volume_pool.usage.promised_bytes,
            allocated_bytes=seen.volume_pool.usage.allocated_bytes,
            overcommit=seen.volume_pool.overcommit,
        )
        if seen.volume_pool
        else None,
        components=_components(seen),
        start_time=timestamp(seen.start_time),
        store=node_pb2.StoreUsage(
            size_bytes=seen.store_usage.size_bytes,
            in_use_bytes=seen.store_usage.in_use_bytes,
            quota_bytes=seen.store_usage.quota_bytes or None,
            full=bool(seen.store_usage.full),
        )
        if seen.store_usage
        else None,
    )


def _components(seen: NodeView) -> Iterator[node_pb2.ComponentHealth]:
    yield node_pb2.ComponentHealth(
        component=node_pb2.NODE_COMPONENT_ENGINE, healthy=not seen.engine_error, message=seen.engine_error
    )
    full = seen.store_usage.full if seen.store_usage else ""
    trouble = seen.store_error or (full and f"the store is full: {full}")
    yield node_pb2.ComponentHealth(component=node_pb2.NODE_COMPONENT_STORE, healthy=not trouble, message=trouble)
    yield node_pb2.ComponentHealth(
        component=node_pb2.NODE_COMPONENT_GPU_DRIVER,
        # A node without a driver is well. A driver that was there and has something to report is not.
        healthy=not (seen.gpus.driver_version and seen.gpus.message),
        message=seen.gpus.message,
    )
