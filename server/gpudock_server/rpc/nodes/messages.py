"""Converts nodes, GPUs and drift to messages."""

from __future__ import annotations

from collections.abc import Iterator

from gpudock.v1 import drift_pb2, gpu_pb2, node_pb2

from gpudock_server.core.nodes import HeldGpu, NodeView
from gpudock_server.core.placement.allocator import unavailable_reason
from gpudock_server.model.claims import PortKey
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy, DriftSeverity
from gpudock_server.model.gpu import Gpu, GpuHealth, GpuProcess, MigMode
from gpudock_server.rpc.operations.messages import LAYER_TRANSFER_METHODS
from gpudock_server.rpc.port_messages import port_range_message
from gpudock_server.rpc.timestamps import timestamp

GPU_HEALTHS = {health: gpu_pb2.GpuHealth.Value(f"GPU_HEALTH_{health.name}") for health in GpuHealth}

_MIG_MODES = {
    MigMode.UNSUPPORTED: gpu_pb2.MIG_MODE_NOT_SUPPORTED,
    MigMode.DISABLED: gpu_pb2.MIG_MODE_DISABLED,
    MigMode.ENABLED: gpu_pb2.MIG_MODE_ENABLED,
}
DRIFT_KINDS = {kind: drift_pb2.DriftKind.Value(f"DRIFT_KIND_{kind.name}") for kind in DriftKind}
DRIFT_SEVERITIES = {
    severity: drift_pb2.DriftSeverity.Value(f"DRIFT_SEVERITY_{severity.name}") for severity in DriftSeverity
}
_DRIFT_REMEDIES = {remedy: drift_pb2.DriftRemedy.Value(f"DRIFT_REMEDY_{remedy.name}") for remedy in DriftRemedy}


def node_message(view: NodeView) -> node_pb2.Node:
    """A node at one moment; values of components that did not answer are absent, and `components` says why."""
    engine = view.engine
    return node_pb2.Node(
        name=view.name,
        daemon_version=view.version,
        engine=node_pb2.EngineInfo(
            id=engine.id,
            version=engine.version,
            api_version=engine.api_version,
            storage_driver=engine.storage_driver,
        )
        if engine
        else None,
        etcd_version=view.store_version,
        driver_version=view.gpus.driver_version,
        nvml_version=view.gpus.nvml_version,
        cuda_driver_version=view.gpus.cuda_driver_version,
        capacity=node_pb2.NodeCapacity(
            gpus=len(view.gpus.gpus),
            cpus=engine.cpus if engine else 0,
            memory_bytes=engine.memory_bytes if engine else 0,
        ),
        free_gpus=view.free_gpus,
        claimed_gpus=view.claimed_gpus,
        memory_available_bytes=view.memory_available_bytes,
        ports=port_range_message(view.port_range, (key for key in view.claims.claims if isinstance(key, PortKey))),
        disk=node_pb2.DiskUsage(path=view.disk.path, total_bytes=view.disk.total_bytes, free_bytes=view.disk.free_bytes)
        if view.disk
        else None,
        layer_carry=[
            node_pb2.LayerCarrySupport(method=LAYER_TRANSFER_METHODS[method], available=not reason, reason=reason)
            for method, reason in view.carry_methods
        ],
        volume_pool=node_pb2.VolumePool(
            path=view.volume_pool.path,
            total_bytes=view.volume_pool.usage.total_bytes,
            free_bytes=view.volume_pool.usage.free_bytes,
            promised_bytes=view.volume_pool.usage.promised_bytes,
            allocated_bytes=view.volume_pool.usage.allocated_bytes,
            overcommit=view.volume_pool.overcommit,
        )
        if view.volume_pool
        else None,
        components=_components(view),
        start_time=timestamp(view.start_time),
        store=node_pb2.StoreUsage(
            size_bytes=view.store_usage.size_bytes,
            in_use_bytes=view.store_usage.in_use_bytes,
            quota_bytes=view.store_usage.quota_bytes or None,
            full=bool(view.store_usage.full),
        )
        if view.store_usage
        else None,
    )


def _components(view: NodeView) -> Iterator[node_pb2.ComponentHealth]:
    yield node_pb2.ComponentHealth(
        component=node_pb2.NODE_COMPONENT_ENGINE, healthy=not view.engine_error, message=view.engine_error
    )
    full = view.store_usage.full if view.store_usage else ""
    problem = view.store_error or (full and f"the store is full: {full}")
    yield node_pb2.ComponentHealth(component=node_pb2.NODE_COMPONENT_STORE, healthy=not problem, message=problem)
    yield node_pb2.ComponentHealth(
        component=node_pb2.NODE_COMPONENT_GPU_DRIVER,
        # A node without a driver is healthy. A driver that reports a problem is not.
        healthy=not (view.gpus.driver_version and view.gpus.message),
        message=view.gpus.message,
    )


def gpu_message(held: HeldGpu) -> gpu_pb2.Gpu:
    """A GPU with its holder; values that the driver does not report are absent."""
    gpu: Gpu = held.gpu
    return gpu_pb2.Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        minor_number=gpu.minor_number,
        name=gpu.name,
        pci_bus_id=gpu.pci_bus_id,
        memory_total_bytes=gpu.memory_total_bytes,
        memory_used_bytes=gpu.memory_used_bytes,
        utilization_percent=gpu.utilization_percent,
        temperature_celsius=gpu.temperature_celsius,
        power_milliwatts=gpu.power_milliwatts,
        mig_mode=_MIG_MODES[gpu.mig_mode],
        health=GPU_HEALTHS[gpu.health],
        health_message=gpu.health_message,
        processes=[_process(process) for process in gpu.processes],
        container=held.holder.container if held.holder else "",
        schedulable=gpu.schedulable,
        unschedulable_reason=unavailable_reason(gpu),
    )


def _process(process: GpuProcess) -> gpu_pb2.GpuProcess:
    return gpu_pb2.GpuProcess(pid=process.pid, name=process.name, used_memory_bytes=process.used_memory_bytes)


def drift_message(drift: Drift) -> drift_pb2.Drift:
    """One difference between records, claims and engine."""
    return drift_pb2.Drift(
        kind=DRIFT_KINDS[drift.kind],
        severity=DRIFT_SEVERITIES[drift.severity],
        remedy=_DRIFT_REMEDIES[drift.remedy],
        message=drift.message,
        plan=drift.plan,
        container=drift.container,
        container_uid=drift.uid,
        engine_id=drift.engine_id,
        engine_name=drift.engine_name,
        claim=drift.claim,
        operation_id=drift.operation_id,
        other_container=drift.other,
        key=drift.key,
        expected=drift.expected,
        actual=drift.actual,
        since_time=timestamp(drift.since),
        due_time=timestamp(drift.due_time),
        volume=drift.volume,
    )
