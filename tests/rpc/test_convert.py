"""Conversion of records to messages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from gpudock.v1 import container_pb2, exec_pb2, gpu_pb2, node_pb2, operation_pb2, port_pb2
from gpudock_server.core.exec.sessions import Exited
from gpudock_server.core.nodes import HeldGpu, HeldPort, NodeView, VolumePool
from gpudock_server.core.operations.active_operation import OperationView
from gpudock_server.model.claims import ClaimTable, GpuKey, Holder, PortKey
from gpudock_server.model.container import (
    Container,
    ContainerState,
    ContainerStatus,
    EngineBinding,
    Placement,
    PortBinding,
)
from gpudock_server.model.engine import EngineInfo, ExecStream
from gpudock_server.model.gpu import Gpu, GpuHealth, GpuProcess, GpuReport, MigMode
from gpudock_server.model.operation import (
    LayerTransferMethod,
    Operation,
    OperationKind,
    OperationPlan,
    OperationState,
    RecordedError,
    Stage,
    StageState,
)
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.spec import ContainerSpec, GpuRequest, HealthCheck, Protocol, TmpfsMount
from gpudock_server.model.volume import PoolUsage
from gpudock_server.ports import ContainerView, DiskUsage, StoreUsage
from gpudock_server.rpc import port_messages
from gpudock_server.rpc.containers import messages as container_messages
from gpudock_server.rpc.containers.spec_messages import RESTART_POLICIES, spec_message
from gpudock_server.rpc.containers.spec_requests import spec as checked_spec
from gpudock_server.rpc.exec.call import encoded_output, exec_exited_message
from gpudock_server.rpc.nodes.messages import GPU_HEALTHS, gpu_message, node_message
from gpudock_server.rpc.operations import messages as operation_messages
from gpudock_server.rpc.timestamps import duration, timestamp
from gpudock_server.rpc.validation.violations import Violations
from hypothesis import given
from hypothesis import strategies as st

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
HOLDER = Holder(container="train", uid="u1", node="gpu1", operation_id="op1")


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)))  # noqa: DTZ001 - the test adds the zone
def test_times_keep_every_microsecond(moment: datetime) -> None:
    zoned = moment.replace(tzinfo=UTC)
    message = timestamp(zoned)
    assert message is not None
    assert message.ToDatetime(tzinfo=UTC) == zoned


@given(st.timedeltas(min_value=timedelta(days=-1000), max_value=timedelta(days=1000)))
def test_durations_keep_every_microsecond_and_are_normalized(span: timedelta) -> None:
    message = duration(span)
    assert message is not None
    assert message.ToTimedelta() == span
    assert message.seconds * message.nanos >= 0


def test_missing_values_are_unset() -> None:
    assert timestamp(None) is None
    assert duration(None) is None


def test_every_enum_value_of_records_has_one_in_the_contract() -> None:
    assert len(set(container_messages.STATES.values())) == len(ContainerState)
    assert len(set(operation_messages.KINDS.values())) == len(OperationKind)
    assert len(set(operation_messages.STATES.values())) == len(OperationState)
    assert len(set(operation_messages.LAYER_TRANSFER_METHODS.values())) == len(LayerTransferMethod)
    assert len(set(GPU_HEALTHS.values())) == len(GpuHealth)
    assert len(set(port_messages.PROTOCOLS.values())) == len(Protocol)
    every = (
        container_messages.STATES,
        operation_messages.KINDS,
        operation_messages.STATES,
        operation_messages.LAYER_TRANSFER_METHODS,
        GPU_HEALTHS,
        port_messages.PROTOCOLS,
    )
    assert not any(0 in table.values() for table in every)
    assert set(RESTART_POLICIES.values()) == {1, 2, 3, 4}


TEXTS = st.sampled_from(["a", "b", "x y", "é"])
SPECS = st.builds(
    container_pb2.ContainerSpec,
    image=st.just("busybox"),
    entrypoint=st.lists(TEXTS, max_size=2),
    command=st.lists(TEXTS, max_size=2),
    env=st.dictionaries(TEXTS, TEXTS, max_size=2),
    working_dir=st.sampled_from(["", "/srv"]),
    user=st.sampled_from(["", "1:2"]),
    hostname=st.none() | st.just("box"),
    tty=st.booleans(),
    stdin=st.booleans(),
    labels=st.dictionaries(st.sampled_from(["a", "b"]), TEXTS),
    gpus=st.none()
    | st.builds(container_pb2.GpuRequest, count=st.integers(1, 16), model=st.sampled_from(["", "a100"]))
    | st.builds(container_pb2.GpuRequest, uuids=st.just(["GPU-1", "GPU-2"])),
    cpus=st.sampled_from([0.0, 0.01, 1.5]),
    memory_bytes=st.sampled_from([0, 1 << 40]),
    shm_size_bytes=st.sampled_from([0, 1 << 20]),
    pids_limit=st.sampled_from([0, 64]),
    mounts=st.sampled_from(
        [
            [],
            [
                container_pb2.Mount(volume="v", target="/a", read_only=True),
                container_pb2.Mount(host_path="/", target="/b"),
            ],
            [container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(), target="/a")],
            [container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(size_bytes=9, mode=0), target="/a")],
        ]
    ),
    ports=st.lists(
        st.builds(
            container_pb2.PortRequest,
            container_port=st.integers(1, 65535),
            protocol=st.sampled_from([port_pb2.PORT_PROTOCOL_TCP, port_pb2.PORT_PROTOCOL_UDP]),
        ),
        max_size=3,
        unique_by=lambda request: request.container_port,
    ),
    restart_policy=st.none()
    | st.builds(container_pb2.RestartPolicy, policy=st.sampled_from([2, 3]))
    | st.just(container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ON_FAILURE, max_retry_count=2)),
    stop_signal=st.sampled_from(["", "SIGINT", "term"]),
    stop_timeout=st.none() | st.timedeltas(timedelta(0), timedelta(days=1)).map(duration),
    health_check=st.none()
    | st.builds(
        container_pb2.HealthCheck,
        command=st.sampled_from([[], ["true", "x"]]),
        interval=st.none() | st.just(duration(timedelta(seconds=1))),
        timeout=st.none() | st.just(duration(timedelta(seconds=2))),
        start_period=st.none() | st.just(duration(timedelta(seconds=3))),
        retries=st.sampled_from([0, 1, 7]),
    ),
)


@given(SPECS)
def test_a_spec_is_returned_as_it_was_sent(sent: container_pb2.ContainerSpec) -> None:
    violations = Violations()
    kept = checked_spec(violations, sent)
    violations.raise_if_any()
    assert spec_message(kept) == sent
    # Also after it was stored.
    assert spec_message(ContainerSpec.model_validate_json(kept.model_dump_json())) == sent


def test_default_values_are_omitted() -> None:
    shown = spec_message(ContainerSpec(image="a", gpus=GpuRequest(), health_check=HealthCheck(command=("true",))))
    assert not shown.HasField("gpus")
    assert not shown.HasField("restart_policy")
    assert shown.health_check == container_pb2.HealthCheck(command=["true"])
    assert TmpfsMount().mode == 0o1777


def container(**changes: Any) -> Container:
    """A container that runs with a GPU and a port."""
    placement = Placement(
        gpu_uuids=("GPU-1",), ports=(PortBinding(container_port=80, protocol=Protocol.UDP, host_port=20000),)
    )
    whole = Container(
        name="train",
        uid="775baa82-3ce7-4e7a-8bcc-378cb9b57fd7",
        node="gpu1",
        owner="team",
        generation=3,
        revision=2,
        spec=ContainerSpec(image="busybox"),
        status=ContainerStatus(
            state=ContainerState.RUNNING,
            placement=placement,
            holds_resources=True,
            health="healthy",
            message="well",
            restart_count=4,
            start_time=MOMENT,
        ),
        engine=EngineBinding(
            engine_id="e1", engine_name="n1", image_id="sha256:1", placement=placement, fixed_digest="d"
        ),
        create_time=MOMENT,
        update_time=MOMENT,
    )
    return whole.changed(**changes)


def test_a_container_with_the_operation_that_holds_its_lock() -> None:
    shown = container_messages.container_view_message(ContainerView(container(), 7, "op1"))
    assert shown == container_pb2.Container(
        name="train",
        uid="775baa82-3ce7-4e7a-8bcc-378cb9b57fd7",
        node="gpu1",
        owner="team",
        etag=container().etag,
        revision=2,
        spec=container_pb2.ContainerSpec(image="busybox"),
        status=container_pb2.ContainerStatus(
            state=container_pb2.CONTAINER_STATE_RUNNING,
            gpu_uuids=["GPU-1"],
            ports=[port_pb2.PortBinding(container_port=80, protocol=port_pb2.PORT_PROTOCOL_UDP, host_port=20000)],
            holds_resources=True,
            engine_id="e1",
            health=container_pb2.CONTAINER_HEALTH_HEALTHY,
            message="well",
            start_time=timestamp(MOMENT),
            operation_id="op1",
            restart_count=4,
            image_id="sha256:1",
        ),
        create_time=timestamp(MOMENT),
        update_time=timestamp(MOMENT),
    )


def test_an_exit_code_of_zero_is_set() -> None:
    assert not container_messages.container_message(container()).status.HasField("exit_code")
    assert container_messages.container_message(container().with_status(exit_code=0)).status.HasField("exit_code")


def test_a_container_without_an_engine_container() -> None:
    shown = container_messages.container_message(
        container(engine=None).with_status(state=ContainerState.CREATING, health="odd")
    )
    assert shown.status.engine_id == ""
    assert shown.status.health == container_pb2.CONTAINER_HEALTH_UNSPECIFIED


def journal(state: OperationState, *stages: StageState, **changes: Any) -> Operation:
    """Return an operation with stages s0, s1, …; all except pending ones have begun."""
    return Operation(
        id="op1",
        kind=OperationKind.SCALE,
        target=ResourceRef(kind=ResourceKind.CONTAINER, name="train", uid="u1"),
        node="gpu1",
        state=state,
        stages=tuple(
            Stage(name=f"s{number}", state=stage, start_time=None if stage is StageState.PENDING else MOMENT)
            for number, stage in enumerate(stages)
        ),
        create_time=MOMENT,
        update_time=MOMENT,
    ).changed(**changes)


PENDING, RUNNING, DONE, UNDONE = StageState.PENDING, StageState.RUNNING, StageState.DONE, StageState.UNDONE
ERROR = RecordedError(code=8, reason="GPU_EXHAUSTED", message="none", metadata={"free": "0", "model": ""})


@pytest.mark.parametrize(
    ("record", "stage", "states"),
    [
        (journal(OperationState.RUNNING, PENDING, PENDING), "", "PENDING PENDING"),
        (journal(OperationState.RUNNING, DONE, RUNNING, PENDING), "s1", "SUCCEEDED RUNNING PENDING"),
        (journal(OperationState.RUNNING, DONE, DONE, PENDING), "s1", "SUCCEEDED SUCCEEDED PENDING"),
        (journal(OperationState.UNDOING, DONE, RUNNING, PENDING), "s1", "SUCCEEDED UNDOING PENDING"),
        (journal(OperationState.UNDOING, DONE, UNDONE, PENDING), "s1", "UNDOING FAILED PENDING"),
        (journal(OperationState.FAILED, UNDONE, UNDONE, PENDING), "s1", "UNDONE FAILED PENDING"),
        # The commit failed.
        (journal(OperationState.UNDOING, DONE, RUNNING), "s1", "SUCCEEDED UNDOING"),
        (journal(OperationState.FAILED, UNDONE, RUNNING), "s1", "UNDONE FAILED"),
        (journal(OperationState.UNDOING, DONE, UNDONE, cancel_requested=True), "s1", "UNDOING UNDONE"),
        (
            journal(OperationState.CANCELLED, UNDONE, UNDONE, PENDING, cancel_requested=True),
            "s1",
            "UNDONE UNDONE PENDING",
        ),
        (journal(OperationState.CANCELLED, UNDONE, RUNNING, cancel_requested=True), "s1", "UNDONE UNDONE"),
        (journal(OperationState.SUCCEEDED, DONE, DONE), "s1", "SUCCEEDED SUCCEEDED"),
        (journal(OperationState.PLANNED, PENDING, PENDING), "", "PENDING PENDING"),
    ],
)
def test_the_current_stage_and_the_states_of_stages(record: Operation, stage: str, states: str) -> None:
    shown = operation_messages.operation_message(OperationView(record))
    names = [operation_pb2.OperationStageState.Name(found.state) for found in shown.stages]
    assert shown.stage == stage
    assert [name.removeprefix("OPERATION_STAGE_STATE_") for name in names] == states.split()


def test_bytes_are_shown_in_the_current_stage() -> None:
    shown = operation_messages.operation_message(
        OperationView(journal(OperationState.RUNNING, DONE, RUNNING, PENDING), 5, 9)
    )
    assert (shown.current_bytes, shown.total_bytes) == (5, 9)
    assert [(stage.current_bytes, stage.total_bytes) for stage in shown.stages] == [(0, 0), (5, 9), (0, 0)]


def test_an_error_is_shown_after_the_undo() -> None:
    undoing = operation_messages.operation_message(OperationView(journal(OperationState.UNDOING, DONE, error=ERROR)))
    assert not undoing.HasField("error")
    failed = operation_messages.operation_message(
        OperationView(journal(OperationState.FAILED, UNDONE, error=ERROR, end_time=MOMENT))
    )
    assert failed.error == operation_pb2.OperationError(
        code=8, reason="GPU_EXHAUSTED", message="none", metadata={"free": "0"}
    )
    assert failed.end_time == timestamp(MOMENT)


def test_a_plan_has_no_times_and_no_id() -> None:
    plan = OperationPlan(
        kept_gpu_uuids=("GPU-1",),
        claimed_gpu_uuids=("GPU-2", "GPU-3"),
        released_gpu_uuids=("GPU-4",),
        claimed_ports=(PortBinding(container_port=80, host_port=20001),),
        bytes_to_move=1,
        bytes_available=2,
        restarts_process=True,
        carry_method=LayerTransferMethod.COPY,
        warnings=("w",),
    )
    shown = operation_messages.operation_message(
        OperationView(journal(OperationState.PLANNED, PENDING, PENDING, id="", plan=plan))
    )
    assert shown.plan == operation_pb2.OperationPlan(
        stages=["s0", "s1"],
        kept_gpu_uuids=["GPU-1"],
        released_gpu_uuids=["GPU-4"],
        gpus_to_claim=2,
        candidate_gpu_uuids=["GPU-2", "GPU-3"],
        ports_to_claim=[port_pb2.PortBinding(container_port=80, protocol=port_pb2.PORT_PROTOCOL_TCP, host_port=20001)],
        bytes_to_move=1,
        bytes_available=2,
        restarts_process=True,
        carry_method=operation_pb2.LAYER_CARRY_METHOD_COPY,
        warnings=["w"],
    )
    assert shown.id == ""
    assert not any(shown.HasField(field) for field in ("create_time", "update_time", "end_time"))


def test_a_gpu_and_its_holder() -> None:
    gpu = Gpu(
        uuid="GPU-1",
        index=1,
        minor_number=2,
        name="NVIDIA A100",
        pci_bus_id="0:1",
        memory_total_bytes=80,
        memory_used_bytes=0,
        utilization_percent=0,
        mig_mode=MigMode.DISABLED,
        processes=(GpuProcess(pid=1, name="p"),),
    )
    shown = gpu_message(HeldGpu(gpu, HOLDER))
    assert (shown.container, shown.schedulable, shown.unschedulable_reason) == ("train", True, "")
    assert shown.mig_mode == gpu_pb2.MIG_MODE_DISABLED
    assert shown.HasField("utilization_percent")
    assert not shown.HasField("temperature_celsius")
    assert not shown.processes[0].HasField("used_memory_bytes")
    lost = gpu_message(HeldGpu(gpu.model_copy(update={"health": GpuHealth.LOST, "health_message": "XID 79"}), None))
    assert (lost.container, lost.schedulable, lost.unschedulable_reason) == ("", False, "XID 79")
    split = gpu_message(HeldGpu(gpu.model_copy(update={"mig_mode": MigMode.ENABLED}), None))
    assert not split.schedulable
    assert "MIG" in split.unschedulable_reason


def test_ports_and_the_free_ports_of_the_range() -> None:
    inside, outside = PortKey(Protocol.TCP, 20001), PortKey(Protocol.UDP, 8080)
    claim = port_messages.port_claim_message(HeldPort(inside, HOLDER), 80)
    assert (claim.host_port, claim.container_port, claim.container, claim.container_uid) == (20001, 80, "train", "u1")
    left = port_messages.port_range_message((20000, 20009), [inside, outside])
    assert (left.free_tcp_ports, left.free_udp_ports, left.claimed_ports) == (9, 10, 2)


def node_view(**changes: Any) -> NodeView:
    """Return a healthy node."""
    fields: dict[str, Any] = {
        "name": "gpu1",
        "version": "0.1",
        "start_time": MOMENT,
        "engine": EngineInfo(
            id="E", version="27", api_version="1.47", storage_driver="overlay2", root_dir="/d", cpus=2, memory_bytes=8
        ),
        "engine_error": "",
        "store_version": "3.5",
        "store_error": "",
        "store_usage": StoreUsage(size_bytes=9, in_use_bytes=7, quota_bytes=8, full=""),
        "gpus": GpuReport(gpus=(Gpu(uuid="GPU-1", index=0), Gpu(uuid="GPU-2", index=1)), driver_version="550"),
        "claims": ClaimTable({GpuKey("GPU-1"): HOLDER, PortKey(Protocol.TCP, 20001): HOLDER}),
        "port_range": (20000, 20009),
        "memory_available_bytes": 4,
        "disk": DiskUsage("/d", 10, 0),
        "volume_pool": VolumePool(
            "/v", PoolUsage(total_bytes=9, free_bytes=8, promised_bytes=7, allocated_bytes=6), 1.5
        ),
        "carry_methods": ((LayerTransferMethod.EXCHANGE, "no"), (LayerTransferMethod.COPY, "")),
    }
    return NodeView(**{**fields, **changes})


def test_a_healthy_node() -> None:
    shown = node_message(node_view())
    assert (shown.capacity.gpus, shown.free_gpus, shown.claimed_gpus) == (2, 1, 1)
    assert (shown.ports.free_tcp_ports, shown.ports.claimed_ports) == (9, 1)
    assert shown.disk.HasField("free_bytes")
    pool = shown.volume_pool
    assert (pool.total_bytes, pool.free_bytes, pool.promised_bytes, pool.allocated_bytes) == (9, 8, 7, 6)
    assert (pool.path, pool.overcommit) == ("/v", 1.5)
    assert [(way.available, way.reason) for way in shown.layer_carry] == [(False, "no"), (True, "")]
    assert all(component.healthy for component in shown.components)
    assert len(shown.components) == len(node_pb2.NodeComponent.values()) - 1


def test_a_node_whose_store_is_full() -> None:
    usage = StoreUsage(size_bytes=9, in_use_bytes=7, quota_bytes=0, full="buy a disk")
    shown = node_message(node_view(store_usage=usage))
    assert (shown.store.size_bytes, shown.store.in_use_bytes, shown.store.full) == (9, 7, True)
    assert not shown.store.HasField("quota_bytes")
    assert [(part.healthy, part.message) for part in shown.components] == [
        (True, ""),
        (False, "the store is full: buy a disk"),
        (True, ""),
    ]
    assert shown.free_gpus == 1, "the GPUs of a node with a full store count as used"


def test_a_node_whose_engine_and_store_do_not_respond() -> None:
    gone = GpuReport(driver_version="550", message="hangs")
    shown = node_message(node_view(engine=None, engine_error="gone", store_error="away", disk=None, gpus=gone))
    assert not shown.HasField("engine")
    assert not shown.HasField("disk")
    assert [(part.healthy, part.message) for part in shown.components] == [
        (False, "gone"),
        (False, "away"),
        (False, "hangs"),
    ]


def test_a_node_without_a_driver_is_healthy() -> None:
    shown = node_message(node_view(gpus=GpuReport(message="no driver")))
    assert [(part.healthy, part.message) for part in shown.components][2] == (True, "no driver")


def test_the_exit_of_a_command() -> None:
    assert exec_exited_message(Exited(code=0)).WhichOneof("result") == "code"
    killed = exec_exited_message(Exited(code=137, signal="SIGKILL", timed_out=True))
    assert (killed.WhichOneof("result"), killed.signal, killed.timed_out) == ("signal", "SIGKILL", True)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 524_288, 1 << 21])
@pytest.mark.parametrize("stream", list(ExecStream))
def test_output_is_encoded_as_protobuf_does(stream: ExecStream, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    message = exec_pb2.ExecContainerResponse(**{stream.value: data})  # type: ignore[arg-type]  # keyword arguments by field name
    assert encoded_output(stream, data) == message.SerializeToString()
