"""Containers, GPUs, ports, drift and nodes as text."""

from __future__ import annotations

from collections.abc import Iterable

from gpudock._enums import enum_name
from gpudock.cli._output import View, details_only, table_only
from gpudock.cli._spec_views import spec_rows
from gpudock.cli._tables import fields, table
from gpudock.cli._text import age_text, bytes_text, moment_text
from gpudock.v1.committed_image_pb2 import CommittedImage
from gpudock.v1.container_pb2 import Container, ContainerHealth, ContainerState
from gpudock.v1.drift_pb2 import Drift, DriftKind, DriftRemedy, DriftSeverity
from gpudock.v1.gpu_pb2 import Gpu, GpuHealth, MigMode
from gpudock.v1.node_pb2 import LayerCarrySupport, Node, NodeComponent, StoreUsage
from gpudock.v1.operation_pb2 import LayerCarryMethod
from gpudock.v1.port_claim_pb2 import PortClaim
from gpudock.v1.port_pb2 import PortBinding, PortProtocol


def _containers(items: Iterable[Container]) -> str:
    return table(
        ("NAME", "STATE", "GPUS", "PORTS", "IMAGE", "REVISION", "AGE", "NODE"),
        [
            (
                item.name,
                _state(item),
                str(len(item.status.gpu_uuids)),
                ",".join(map(binding, item.status.ports)),
                item.spec.image,
                str(item.revision),
                age_text(item.create_time),
                item.node,
            )
            for item in items
        ],
        wrap=("PORTS", "IMAGE", "NODE"),
    )


def _committed_image(item: CommittedImage) -> str:
    return fields(
        (
            ("name", item.name),
            ("id", item.id),
            ("size", bytes_text(item.size_bytes)),
            ("container", item.container),
            ("revision", str(item.revision)),
            ("created", moment_text(item.create_time)),
        )
    )


def container_details(item: Container) -> str:
    """Return a line for each field that is set."""
    status = item.status
    return fields(
        (
            ("name", item.name),
            ("uid", item.uid),
            ("node", item.node),
            ("owner", item.owner),
            ("state", _state(item)),
            ("message", status.message),
            ("exit code", str(status.exit_code) if status.HasField("exit_code") else ""),
            ("killed for memory", "yes" if status.oom_killed else ""),
            ("revision", str(item.revision)),
            *spec_rows(item.spec),
            ("GPUs", ", ".join(status.gpu_uuids) or "none"),
            ("ports", ", ".join(map(binding, status.ports))),
            ("holds resources", "yes" if status.holds_resources else "no"),
            ("restarts", str(status.restart_count) if status.restart_count else ""),
            ("operation", status.operation_id),
            ("image id", status.image_id),
            ("engine id", status.engine_id),
            ("created", moment_text(item.create_time)),
            ("started", moment_text(status.start_time)),
            ("finished", moment_text(status.finish_time)),
            ("etag", item.etag),
        )
    )


def _gpus(items: Iterable[Gpu]) -> str:
    return table(
        ("INDEX", "UUID", "NAME", "MEMORY", "USED", "UTIL", "TEMP", "POWER", "HEALTH", "CONTAINER"),
        [
            (
                str(item.index),
                item.uuid,
                item.name,
                bytes_text(item.memory_total_bytes),
                bytes_text(item.memory_used_bytes) if item.HasField("memory_used_bytes") else "-",
                f"{item.utilization_percent}%" if item.HasField("utilization_percent") else "-",
                f"{item.temperature_celsius}C" if item.HasField("temperature_celsius") else "-",
                f"{item.power_milliwatts // 1000}W" if item.HasField("power_milliwatts") else "-",
                _health(item),
                item.container or "-",
            )
            for item in items
        ],
        wrap=("UUID", "NAME", "HEALTH", "CONTAINER"),
    )


def _ports(items: Iterable[PortClaim]) -> str:
    return table(
        ("PORT", "PROTOCOL", "CONTAINER", "CONTAINER-PORT"),
        [
            (
                str(item.host_port),
                enum_name(PortProtocol, item.protocol).lower(),
                item.container,
                str(item.container_port),
            )
            for item in items
        ],
        wrap=("CONTAINER",),
    )


def _drift(items: Iterable[Drift]) -> str:
    return table(
        ("SEVERITY", "KIND", "CONTAINER", "SINCE", "REMEDY", "DUE", "WHAT", "PLAN"),
        [
            (
                enum_name(DriftSeverity, item.severity),
                enum_name(DriftKind, item.kind).lower().replace("_", "-"),
                item.container or "-",
                age_text(item.since_time),
                enum_name(DriftRemedy, item.remedy).lower(),
                moment_text(item.due_time) if item.HasField("due_time") else "-",
                item.message,
                item.plan,
            )
            for item in items
        ],
        wrap=("KIND", "CONTAINER", "DUE", "WHAT", "PLAN"),
    )


def node_details(item: Node) -> str:
    """Return a line for each field, and for each component whether it answers."""
    capacity, engine, disk = item.capacity, item.engine, item.disk
    free_disk = f"{bytes_text(disk.free_bytes)} free in " if disk.HasField("free_bytes") else ""
    return fields(
        (
            ("name", item.name),
            ("gpudockd", item.daemon_version),
            ("engine", " ".join(filter(None, (engine.version, engine.storage_driver)))),
            ("etcd", item.etcd_version),
            ("store size", _store_size(item.store) if item.HasField("store") else "?"),
            ("driver", item.driver_version),
            ("CUDA", item.cuda_driver_version),
            ("GPUs", f"{capacity.gpus}: {item.free_gpus} free, {item.claimed_gpus} held"),
            ("CPUs", str(capacity.cpus)),
            ("memory", f"{bytes_text(capacity.memory_bytes)}: {bytes_text(item.memory_available_bytes)} available"),
            ("ports", f"{item.ports.first_port}-{item.ports.last_port}: {item.ports.free_tcp_ports} free for TCP"),
            ("disk", f"{free_disk}{disk.path}"),
            ("layer carry", ", ".join(map(_carry, item.layer_carry))),
            *(
                (
                    enum_name(NodeComponent, each.component).lower().replace("_", " "),
                    _component(
                        each.healthy,
                        each.message,
                        full=item.store.full and each.component == NodeComponent.NODE_COMPONENT_STORE,
                        missing=not item.driver_version and each.component == NodeComponent.NODE_COMPONENT_GPU_DRIVER,
                    ),
                )
                for each in item.components
            ),
            ("started", moment_text(item.start_time)),
        )
    )


def binding(item: PortBinding) -> str:
    """Return a published port as `8080->80/tcp`; `?` stands for a host port that is not chosen yet."""
    return f"{item.host_port or '?'}->{item.container_port}/{enum_name(PortProtocol, item.protocol).lower()}"


def _state(item: Container) -> str:
    state = enum_name(ContainerState, item.status.state)
    if item.status.state == ContainerState.CONTAINER_STATE_RESTARTING and item.status.HasField("exit_code"):
        return f"{state} ({item.status.exit_code})"
    if item.status.health:
        return f"{state} ({enum_name(ContainerHealth, item.status.health).lower()})"
    return state


def _health(item: Gpu) -> str:
    health = enum_name(GpuHealth, item.health)
    mig = " MIG" if item.mig_mode == MigMode.MIG_MODE_ENABLED else ""
    # A GPU that cannot be scheduled may be healthy: for instance, its MIG mode is on.
    why = item.health_message or ("" if item.schedulable else item.unschedulable_reason)
    return f"{health}{mig}" + (f" ({why})" if why else "")


def _carry(item: LayerCarrySupport) -> str:
    word = enum_name(LayerCarryMethod, item.method).lower()
    return word if item.available else f"not {word} ({item.reason})"


def _store_size(usage: StoreUsage) -> str:
    quota = f", quota {bytes_text(usage.quota_bytes)}" if usage.HasField("quota_bytes") else ""
    return f"{bytes_text(usage.in_use_bytes)} in use of {bytes_text(usage.size_bytes)}{quota}"


def _component(healthy: bool, message: str, *, full: bool, missing: bool) -> str:  # noqa: FBT001 - as the message has it
    """Return whether a component answers; `missing` is a GPU driver that is not loaded, which is no failure."""
    trouble = "FULL" if full else "DOES NOT ANSWER"
    well = "does not answer" if missing and message else "answers"
    return (well if healthy else trouble) + (f": {message}" if message else "")


def _port_name(item: PortClaim) -> str:
    return f"{item.host_port}/{enum_name(PortProtocol, item.protocol).lower()}"


CONTAINER = View(lambda item: item.name, _containers, container_details)
COMMITTED_IMAGE = details_only(lambda item: item.name, _committed_image)
GPU = table_only(lambda item: item.uuid, _gpus)
PORT = table_only(_port_name, _ports)
DRIFT = table_only(lambda item: item.container, _drift)
NODE = details_only(lambda item: item.name, node_details)
