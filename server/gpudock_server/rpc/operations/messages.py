"""Converts operations, with the progress of their current stage, to messages."""

from __future__ import annotations

from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from gpudock.v1 import operation_pb2

from gpudock_server.core.operations.active_operation import OperationView
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
from gpudock_server.model.resource import ResourceKind
from gpudock_server.rpc.containers.messages import SNAPSHOT_KINDS
from gpudock_server.rpc.containers.spec_diff import spec_changes
from gpudock_server.rpc.containers.spec_messages import spec_message
from gpudock_server.rpc.port_messages import port_binding_message
from gpudock_server.rpc.timestamps import timestamp

_VOLUME_KINDS = (
    OperationKind.CREATE_VOLUME,
    OperationKind.RESIZE_VOLUME,
    OperationKind.DELETE_VOLUME,
    OperationKind.ADOPT_VOLUME,
)
KINDS = {
    kind: operation_pb2.OperationKind.Value(
        f"OPERATION_KIND_{kind.name}" if kind in _VOLUME_KINDS else f"OPERATION_KIND_{kind.name}_CONTAINER"
    )
    for kind in OperationKind
}
RESOURCE_KINDS = {
    ResourceKind.CONTAINER: operation_pb2.RESOURCE_KIND_CONTAINER,
    ResourceKind.VOLUME: operation_pb2.RESOURCE_KIND_VOLUME,
}
STATES = {state: operation_pb2.OperationState.Value(f"OPERATION_STATE_{state.name}") for state in OperationState}
LAYER_TRANSFER_METHODS = {
    method: operation_pb2.LayerCarryMethod.Value(f"LAYER_CARRY_METHOD_{method.name}") for method in LayerTransferMethod
}

_STAGE_STATES = {
    StageState.PENDING: operation_pb2.OPERATION_STAGE_STATE_PENDING,
    StageState.RUNNING: operation_pb2.OPERATION_STAGE_STATE_RUNNING,
    StageState.DONE: operation_pb2.OPERATION_STAGE_STATE_SUCCEEDED,
    StageState.UNDONE: operation_pb2.OPERATION_STAGE_STATE_UNDONE,
}

_NONE_STARTED = -1


def operation_message(snapshot: OperationView) -> operation_pb2.Operation:
    """An operation with its progress."""
    record = snapshot.operation
    planned = record.state is OperationState.PLANNED
    failed = record.state in (OperationState.FAILED, OperationState.CANCELLED)
    current = _last_started(record.stages)
    return operation_pb2.Operation(
        id=record.id,
        kind=KINDS[record.kind],
        target=operation_pb2.ResourceRef(
            kind=RESOURCE_KINDS[record.target.kind], name=record.target.name, uid=record.target.uid
        ),
        node=record.node,
        state=STATES[record.state],
        stage=record.stages[current].name if current != _NONE_STARTED else "",
        current_bytes=snapshot.current_bytes,
        total_bytes=snapshot.total_bytes,
        stages=_stages(snapshot, current),
        message="; ".join(filter(None, (record.message, snapshot.message))),
        error=_error(record.error) if record.error is not None and failed else None,
        cancel_requested=record.cancel_requested,
        request_id=record.request_id,
        plan=_plan(record),
        create_time=None if planned else timestamp(record.create_time),
        update_time=None if planned else timestamp(record.update_time),
        end_time=timestamp(record.end_time),
    )


def _last_started(stages: tuple[Stage, ...]) -> int:
    # Stages start in order, and none starts after a failure, so the last started stage is the current or failed one.
    indexes = (index for index, stage in enumerate(stages) if stage.state is not StageState.PENDING)
    return max(indexes, default=_NONE_STARTED)


def _stages(snapshot: OperationView, current: int) -> list[operation_pb2.OperationStage]:
    record = snapshot.operation
    # Stages are undone in reverse order, so the last stage that is not undone yet is being undone.
    undoing = max(
        (
            index
            for index, stage in enumerate(record.stages)
            if record.state is OperationState.UNDOING and stage.state in (StageState.RUNNING, StageState.DONE)
        ),
        default=_NONE_STARTED,
    )
    return [
        operation_pb2.OperationStage(
            name=stage.name,
            state=_stage_state(record, stage, is_latest=index == current, is_undoing=index == undoing),
            start_time=timestamp(stage.start_time),
            end_time=timestamp(stage.end_time),
            current_bytes=snapshot.current_bytes if index == current else stage.current_bytes,
            total_bytes=snapshot.total_bytes if index == current else stage.total_bytes,
        )
        for index, stage in enumerate(record.stages)
    ]


def _stage_state(
    record: Operation, stage: Stage, *, is_latest: bool, is_undoing: bool
) -> operation_pb2.OperationStageState.ValueType:
    """The state of a stage for callers. The record only says what to undo; callers also need the stage that failed."""
    if is_undoing:
        return operation_pb2.OPERATION_STAGE_STATE_UNDOING
    failed = record.state in (OperationState.UNDOING, OperationState.FAILED) and not record.cancel_requested
    if is_latest and failed:
        return operation_pb2.OPERATION_STAGE_STATE_FAILED
    if stage.state is StageState.RUNNING and record.state.ended:
        # The point of no return has nothing to undo, so its state in the record stays RUNNING.
        return operation_pb2.OPERATION_STAGE_STATE_UNDONE
    return _STAGE_STATES[stage.state]


def _plan(record: Operation) -> operation_pb2.OperationPlan:
    plan: OperationPlan = record.plan
    return operation_pb2.OperationPlan(
        stages=[stage.name for stage in record.stages],
        kept_gpu_uuids=plan.kept_gpu_uuids,
        released_gpu_uuids=plan.released_gpu_uuids,
        gpus_to_claim=len(plan.claimed_gpu_uuids),
        candidate_gpu_uuids=plan.claimed_gpu_uuids,
        ports_to_claim=[port_binding_message(port) for port in plan.claimed_ports],
        bytes_to_move=plan.bytes_to_move,
        bytes_available=plan.bytes_available,
        restarts_process=plan.restarts_process,
        carry_method=LAYER_TRANSFER_METHODS[plan.carry_method],
        warnings=plan.warnings,
        apparent_bytes=plan.apparent_bytes,
        allocated_bytes=plan.allocated_bytes,
        expected_freeze=_duration(plan.expected_freeze_seconds),
        snapshot=SNAPSHOT_KINDS[plan.snapshot] if plan.snapshot is not None else None,
        spec_changes=_spec_changes(record),
    )


def _spec_changes(record: Operation) -> list[operation_pb2.SpecChange]:
    before, after = record.plan.old_spec, record.plan.new_spec
    # Only for plans: the specs are not in the record, so that only the daemon that started an operation has them.
    if record.state is not OperationState.PLANNED or before is None or after is None:
        return []
    return spec_changes(spec_message(before), spec_message(after))


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    span = Duration()
    span.FromTimedelta(timedelta(seconds=seconds))
    return span


def _error(error: RecordedError) -> operation_pb2.OperationError:
    return operation_pb2.OperationError(
        code=error.code,
        reason=error.reason,
        message=error.message,
        # As in ErrorInfo: keys with empty values are left out.
        metadata={key: value for key, value in error.metadata.items() if value},
    )
