"""The method of a change of a container, and what its plan records and shows."""

from __future__ import annotations

from typing import Any

import pytest
from gpudock_server.core.containers.change_plan import (
    ChangeMethod,
    ChangePlan,
    DesiredState,
    SuccessorFiles,
    SuccessorSource,
    choose_method,
)
from gpudock_server.core.containers.commands import FieldChange, Restart, Scale, ScaleStrategy, Start, Stop, Update
from gpudock_server.model.claims import GpuKey
from gpudock_server.model.container import ContainerState, Placement
from gpudock_server.model.operation import LayerTransferMethod, OperationKind
from gpudock_server.model.spec import GpuRequest
from gpudock_server.ports import LayerTransferPlan

from tests.unit.model_node import SPEC, ModelNode

IN_PLACE, RESTART, REPLACE = ChangeMethod.IN_PLACE, ChangeMethod.RESTART, ChangeMethod.REPLACE
RUNNING, PAUSED, STOPPED = ContainerState.RUNNING, ContainerState.PAUSED, ContainerState.STOPPED
FRESH = SuccessorSource(files=SuccessorFiles.FRESH)
LIMITS, ENV = SPEC.changed(cpus=1.5), SPEC.changed(env={"A": "1"})


@pytest.mark.parametrize(
    ("state", "desired", "method"),
    [
        # Nothing needs another process.
        (RUNNING, {}, IN_PLACE),
        (RUNNING, {"spec": LIMITS}, IN_PLACE),
        (RUNNING, {"spec": LIMITS, "chooses_gpus": True}, IN_PLACE),
        (STOPPED, {"spec": LIMITS, "runs": False}, IN_PLACE),
        (STOPPED, {"spec": SPEC.changed(gpus=GpuRequest(count=3)), "runs": False}, IN_PLACE),
        # A process is to be started, which the engine container can run.
        (STOPPED, {}, RESTART),
        (RUNNING, {"restart": True}, RESTART),
        (PAUSED, {"restart": True}, RESTART),
        # The engine container does not fit, or may not be used.
        (RUNNING, {"spec": ENV}, REPLACE),
        (STOPPED, {"spec": ENV, "runs": False}, REPLACE),
        (RUNNING, {"recreate": True}, REPLACE),
        (RUNNING, {"source": FRESH}, REPLACE),
        (STOPPED, {"source": FRESH, "runs": False}, REPLACE),
    ],
    ids=str,
)
async def test_method_of_a_change(
    model: ModelNode, state: ContainerState, desired: dict[str, Any], method: ChangeMethod
) -> None:
    container = model.container().with_status(state=state)
    engine = container.engine
    assert engine is not None
    fields: dict[str, Any] = {"kind": OperationKind.UPDATE, "spec": container.spec, "runs": True} | desired
    state_after = DesiredState(**fields)
    placement = container.status.placement
    assert choose_method(container, engine, state_after, placement, unbound_host_paths=False) is method
    # Only a process that the same engine container would start needs its host paths.
    expected = REPLACE if method is RESTART else method
    assert choose_method(container, engine, state_after, placement, unbound_host_paths=True) is expected
    # Other GPUs need a successor, except if the process keeps its GPUs, or none is started.
    keeps = state_after.keeps_process(container, engine)
    expected = method if keeps or not state_after.runs else REPLACE
    assert choose_method(container, engine, state_after, Placement(), unbound_host_paths=False) is expected


async def test_a_plan_shows_and_records_what_a_change_does(model: ModelNode) -> None:
    engine = model.container().engine
    assert engine is not None
    before, after = Placement(gpu_uuids=("0", "1")), Placement(gpu_uuids=("1", "2"))
    large = SPEC.changed(labels={"l": "x"}, env={"e": "x"}, command=("run",))
    plan = ChangePlan(
        method=REPLACE,
        old=engine,
        old_state=RUNNING,
        old_spec=large,
        old_placement=before,
        spec=large.changed(cpus=2.0),
        placement=after,
        revision=2,
        runs=True,
        source=SuccessorSource(bytes_to_move=1, warnings=("source",)),
        transfer=LayerTransferPlan(
            method=LayerTransferMethod.COPY, bytes_to_move=2, bytes_available=9, warnings=("transfer",)
        ),
    )
    assert (plan.claimed, plan.released) == ((GpuKey("2"),), (GpuKey("0"),))
    shown = plan.shown
    assert (shown.kept_gpu_uuids, shown.claimed_gpu_uuids, shown.released_gpu_uuids) == (("1",), ("2",), ("0",))
    assert (shown.bytes_to_move, shown.bytes_available, shown.carry_method) == (3, 9, LayerTransferMethod.COPY)
    assert shown.warnings == ("transfer", "source")
    assert shown.restarts_process
    assert (shown.old_spec, shown.new_spec) == (plan.old_spec, plan.spec)
    # Labels and variables of the old spec can be large, and no step needs them.
    read = ChangePlan.model_validate(plan.recorded)
    assert read == plan.model_copy(update={"old_spec": large.changed(labels={}, env={})})


async def test_methods_that_operations_record(model: ModelNode) -> None:
    async def method(command: Scale | Update | Restart | Start) -> object:
        operation = await model.run_ok(command)
        arguments = model.store.arguments[operation.id]
        return arguments["method"], arguments["old_state"], arguments["allowed_exits"]

    assert await method(Scale("a", cpus=1.5)) == ("IN_PLACE", "RUNNING", None)
    assert await method(Scale("a", cpus=2.0, strategy=ScaleStrategy.RECREATE)) == ("REPLACE", "RUNNING", "NONE")
    assert await method(Update("a", FieldChange("env", {"A": "1"}))) == ("REPLACE", "RUNNING", "ZERO")
    assert await method(Restart("a")) == ("RESTART", "RUNNING", "ANY")
    await model.run_ok(Stop("a", keep_resources=True))
    assert await method(Start("a")) == ("RESTART", "STOPPED", "ANY")
    model.configure(start_watch_seconds=0)
    assert await method(Restart("a")) == ("RESTART", "RUNNING", None)
