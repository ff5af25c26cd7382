"""Every scenario, undisturbed, and with each call to the host failing: the command succeeds or changes nothing.

The host is in memory (`model_node.py`), so that all calls of all operations are tried in seconds; tests/faults does the
same on a real engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from gpudock_server.core.operations import engine as operations
from gpudock_server.errors import EngineRejected, EngineUnavailable, GpudockError, OperationNotCancellable
from gpudock_server.model.operation import Operation, OperationState

from tests.rig.patience import limit
from tests.unit.faults import let_tasks_run, raising
from tests.unit.model_node import TIMEOUT_SECONDS, ModelNode
from tests.unit.scenarios import SCENARIOS, Scenario

# An upper bound on the calls of one operation.
MAX_CALLS = 200
REFUSED = raising(lambda name: EngineRejected(call=name, status=500, detail="injected"))
UNANSWERED = raising(lambda name: EngineUnavailable(call=name, detail="injected"))

# The stages of each scenario. Records of older versions are resumed by these names.
STAGES = {
    "create": "pull create start verify commit",
    "create only": "create commit",
    "scale": "create locate gather stop complete carry start verify seal commit retire",
    "scale by copy": "create locate gather stop complete carry start verify seal commit retire",
    "scale by commit": "stop snapshot create start verify commit retire",
    "scale by commit again": "stop snapshot create start verify commit retire",
    "limits": "gather freeze complete thaw seal limits commit",
    "limits, snapshot as image": "freeze snapshot thaw limits commit",
    "update": "create locate gather stop complete carry start verify seal commit retire",
    "update to another image, discarding files": "pull create gather stop complete start verify seal commit retire",
    "update to another image, transferring files": "stop snapshot graft create start verify commit retire",
    "rollback": "create restore gather stop complete start verify seal commit retire",
    "rollback to an image snapshot": "create gather stop complete start verify seal commit retire",
    "rollback of the spec only": "create locate gather stop complete carry start verify seal commit retire",
    "restart": "stop start verify commit",
    "restart of a paused container": "stop start verify commit",
    "stop": "stop commit",
    "stop of a paused container": "stop commit",
    "stop, keeping resources": "stop commit",
    "stop with snapshot": "gather stop complete seal commit",
    "start": "start verify commit",
    "start with other GPUs": "create locate gather complete carry start verify seal commit retire",
    "pause": "pause commit",
    "unpause": "unpause commit",
    "delete": "remove clean commit",
    "delete with images": "remove clean commit",
    "delete a revision": "remove commit",
    "prune": "create locate gather stop complete carry start verify seal commit retire prune",
    "clone": "create gather complete start verify commit",
    "clone by commit": "snapshot create start verify commit",
    "clone of a revision": "create restore start verify commit",
    "clone of a revision with an image snapshot": "name create start verify commit",
    "commit": "copy-files difference commit-files image tag commit clean",
    "commit while frozen": "freeze commit-files thaw image tag commit clean",
    "create a volume": "store engine-volume commit",
    "grow a volume": "grow commit",
    "shrink a volume": "shrink commit",
    "shrink a volume by a copy": "make copy stop difference locate exchange start verify commit retire",
    "delete a volume": "check engine-volume destroy commit",
    "delete a volume that is mounted": "detach check engine-volume destroy commit",
    "adopt a volume": "commit",
    "adopt a copy of a volume": "store engine-volume copy commit",
}

# Steps that a shutdown cancels at once, and for which a starting daemon does not wait.
INTERRUPTIBLE = {"pull", "copy-files", "gather", "restore", "copy"}

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


pytestmark = pytest.mark.usefixtures("no_backoff")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_CANCEL_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(operations, "_RESUME_POLL_SECONDS", 0.001)


async def model_for(scenario: Scenario) -> ModelNode:
    model = ModelNode()
    await scenario.setup(model)
    model.check_consistency()
    model.engine.stop_timeouts.clear()
    model.engine.start_watch_seconds.clear()
    return model


async def summaries_after_undo(scenario: Scenario) -> list[dict[str, object]]:
    """Return the summaries that a node may have after the command failed and was undone."""
    summaries = [(await model_for(scenario)).summary()]
    if scenario.alternative_setup is not None:
        model = ModelNode()
        await scenario.alternative_setup(model)
        summaries.append(model.summary())
    return summaries


async def run_undisturbed(scenario: Scenario) -> ModelNode:
    """Run the scenario without a fault; return its node."""
    model = await model_for(scenario)
    operation = await model.run_ok(scenario.command)
    assert operation.state is OperationState.SUCCEEDED
    return model


def is_plain(value: object) -> bool:
    """Return whether a value has exactly the types that JSON has, as another process would read it."""
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in {str, int, float, bool}


@every_scenario
async def test_a_scenario_succeeds_undisturbed(scenario: Scenario) -> None:
    model = await run_undisturbed(scenario)
    model.check_consistency()
    scenario.check(model)
    operation = model.store.journal[model.last_operation_id].value
    names = [stage.name for stage in operation.stages]
    assert " ".join(names) == STAGES[scenario.name]
    for stage in operation.stages:
        assert stage.current_bytes == stage.total_bytes
    if "verify" in names:
        # A successor is watched for longer than a container that replaces none.
        assert model.engine.start_watch_seconds == [3 if "retire" in names else 2]
    if "carry" in names:
        assert operation.facts("carry") == {"method": "COPY" if scenario.name == "scale by copy" else "EXCHANGE"}
    # Another process builds the same saga from the record as it was before the end.
    operation = operation.changed(arguments=model.store.arguments[operation.id])
    assert is_plain(operation.arguments)
    assert is_plain([stage.facts for stage in operation.stages])
    sagas = model.core.container_use_cases.saga_builders | model.core.volume_use_cases.saga_builders
    saga = sagas[operation.kind](operation)
    assert [*(step.name for step in saga.steps), "commit", *(step.name for step in saga.cleanup_steps)] == names
    for step in (*saga.steps, *saga.cleanup_steps):
        assert step.interruptible is (step.name in INTERRUPTIBLE), step.name


@every_scenario
@pytest.mark.parametrize("act", [REFUSED, UNANSWERED], ids=["refused", "unanswered"])
@pytest.mark.parametrize("after", [False, True], ids=["before_call", "after_call"])
async def test_a_failed_call_is_undone_or_can_be_retried(
    scenario: Scenario, act: Callable[[str], Awaitable[None]], *, after: bool
) -> None:
    after_success, after_undo = (await run_undisturbed(scenario)).summary(), await summaries_after_undo(scenario)
    failures = 0
    for at in range(1, MAX_CALLS):
        model = await model_for(scenario)
        model.faults.inject(at, act, after=after)
        try:
            operation = await model.run(scenario.command)
        except GpudockError:
            # The call failed before the operation began.
            assert model.summary() == after_undo[0], model.faults.hit_call
            continue
        finally:
            model.check_consistency()
        if not model.faults.hit_call:
            break
        if operation.state is OperationState.FAILED:
            failures += 1
        await check_end(model, scenario, operation, after_undo, after_success)
    else:
        raise AssertionError(f"an operation makes more than {MAX_CALLS} calls")
    assert failures or scenario.name == "adopt a volume", "no failed call made the operation fail"


async def check_end(
    model: ModelNode,
    scenario: Scenario,
    operation: Operation,
    after_undo: list[dict[str, object]],
    after_success: dict[str, object],
) -> None:
    context = f"{model.faults.hit_call}, call {len(model.faults.calls)}: {operation.error or operation.message}"
    model.check_consistency()
    if operation.state is OperationState.SUCCEEDED:
        # A message says what differs.
        assert operation.message or model.summary() == after_success, context
        return
    assert operation.error is not None
    assert operation.error.reason != "INTERNAL", context
    if scenario.failure_undoes:
        assert model.summary() in after_undo, context
        return
    again = await model.run(scenario.command)
    assert again.state is OperationState.SUCCEEDED, context
    model.check_consistency()
    if scenario.check_after_retry is not None:
        scenario.check_after_retry(model)
    else:
        assert model.summary() == after_success, context


@every_scenario
async def test_a_cancelled_operation_is_undone_or_succeeds(scenario: Scenario) -> None:
    after_success, after_undo = (await run_undisturbed(scenario)).summary(), await summaries_after_undo(scenario)
    for at in range(1, MAX_CALLS):
        model = await model_for(scenario)
        cancelling: list[asyncio.Task[object]] = []

        async def cancel(
            name: str, model: ModelNode = model, cancelling: list[asyncio.Task[object]] = cancelling
        ) -> None:
            # An operation with a request id is a child of another operation, and no caller cancels it.
            parents = [each for each in model.operations.active if not model.store.journal[each].value.request_id]
            cancelling += [asyncio.create_task(model.operations.cancel(each)) for each in parents]
            await let_tasks_run(name)

        model.faults.inject(at, cancel, after=False)
        operation = await model.run(scenario.command)
        results = await asyncio.gather(*cancelling, return_exceptions=True)
        model.check_consistency()
        if not model.faults.hit_call:
            break
        if operation.state is OperationState.CANCELLED:
            assert operation.cancel_requested
            assert operation.error is not None
            assert operation.error.reason == "OPERATION_CANCELLED"
            assert model.summary() in after_undo, model.faults.hit_call
        else:
            assert operation.state is OperationState.SUCCEEDED
            assert all(isinstance(result, OperationNotCancellable) for result in results), results
            assert model.summary() == after_success, model.faults.hit_call
    else:
        raise AssertionError(f"an operation makes more than {MAX_CALLS} calls")


async def begin_until_blocked(model: ModelNode, scenario: Scenario) -> str:
    """Begin the command and wait for a call that blocks, or for the end.

    Returns the id of the operation; empty if the operation did not begin.
    """
    beginning = asyncio.create_task(model.begin(scenario.command))
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        while not model.faults.blocked and not (beginning.done() and not model.operations.active):
            await asyncio.sleep(0)
    if beginning.done():
        return beginning.result()
    beginning.cancel()
    return ""


@every_scenario
@pytest.mark.parametrize("after", [False, True], ids=["before_call", "after_call"])
async def test_another_process_completes_the_operation(scenario: Scenario, *, after: bool) -> None:
    after_success = (await run_undisturbed(scenario)).summary()
    for at in range(1, MAX_CALLS):
        model = await model_for(scenario)
        before = model.summary()
        model.faults.inject(at, model.faults.block, after=after)
        operation_id = await begin_until_blocked(model, scenario)
        if not model.faults.hit_call:
            break
        await model.restart_daemon()
        model.check_consistency()
        if not operation_id:
            assert model.summary() == before
            continue
        assert model.store.journal[operation_id].value.state is OperationState.SUCCEEDED, model.faults.hit_call
        assert model.summary() == after_success, model.faults.hit_call
    else:
        raise AssertionError(f"an operation makes more than {MAX_CALLS} calls")


@every_scenario
async def test_another_process_completes_the_undo(scenario: Scenario) -> None:
    after_undo = await summaries_after_undo(scenario)
    for at in range(1, MAX_CALLS):
        model = await model_for(scenario)

        async def refuse(name: str, model: ModelNode = model, at: int = at) -> None:
            # This process blocks in the first, second, third or fourth call of the undo.
            model.faults.inject(1 + at % 4, model.faults.block, after=False)
            await REFUSED(name)

        model.faults.inject(at, refuse, after=True)
        try:
            operation_id = await begin_until_blocked(model, scenario)
        except GpudockError:
            continue
        if model.faults.never_hit:
            break
        await model.restart_daemon()
        model.check_consistency()
        if not operation_id:
            continue
        operation = model.store.journal[operation_id].value
        if operation.state is OperationState.SUCCEEDED:
            continue
        assert operation.error is not None
        assert operation.error.reason != "INTERNAL"
        if scenario.failure_undoes:
            assert model.summary() in after_undo, model.faults.hit_call
    else:
        raise AssertionError(f"an operation makes more than {MAX_CALLS} calls")
