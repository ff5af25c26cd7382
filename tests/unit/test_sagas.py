"""Every operation to its end, and with every call to the host failing in turn: it is done, or as if never begun.

The host is in memory (`model_node.py`), so that all moments of all operations are tried in seconds; tests/faults does
the same to a real engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from gpudock_server.core.operations import engine as operations
from gpudock_server.core.operations import journal
from gpudock_server.errors import EngineRejected, EngineUnavailable, GpudockError, OperationNotCancellable
from gpudock_server.model.operation import Operation, OperationState

from tests.rig.patience import limit
from tests.unit.faults import let_tasks_run, raising
from tests.unit.model_node import TIMEOUT_SECONDS, ModelNode
from tests.unit.scenarios import SCENARIOS, Scenario

# No operation makes so many calls.
MOST_CALLS = 200
REFUSED = raising(lambda name: EngineRejected(call=name, status=500, detail="planted"))
UNANSWERED = raising(lambda name: EngineUnavailable(call=name, detail="planted"))

# What each goes through. A record of an older version is driven by these names.
STAGES = {
    "create": "pull create start verify commit",
    "create only": "create commit",
    "scale": "create locate gather stop complete carry start verify seal commit retire",
    "scale by copy": "create locate gather stop complete carry start verify seal commit retire",
    "scale by commit": "stop snapshot create start verify commit retire",
    "scale by commit again": "stop snapshot create start verify commit retire",
    "limits": "gather freeze complete thaw seal limits commit",
    "limits, kept as image": "freeze snapshot thaw limits commit",
    "update": "create locate gather stop complete carry start verify seal commit retire",
    "update to a fresh image": "pull create gather stop complete start verify seal commit retire",
    "update to another image": "stop snapshot graft create start verify commit retire",
    "rollback": "create restore gather stop complete start verify seal commit retire",
    "rollback to an image": "create gather stop complete start verify seal commit retire",
    "rollback of the spec": "create locate gather stop complete carry start verify seal commit retire",
    "restart": "stop start verify commit",
    "restart of what is frozen": "stop start verify commit",
    "stop": "stop commit",
    "stop of what is frozen": "stop commit",
    "stop with resources": "stop commit",
    "stop with files": "gather stop complete seal commit",
    "start": "start verify commit",
    "start with other cards": "create locate gather complete carry start verify seal commit retire",
    "pause": "pause commit",
    "unpause": "unpause commit",
    "delete": "remove clean commit",
    "delete with images": "remove clean commit",
    "delete a revision": "remove commit",
    "prune": "create locate gather stop complete carry start verify seal commit retire prune",
    "clone": "create gather complete start verify commit",
    "clone by commit": "snapshot create start verify commit",
    "clone of a revision": "create restore start verify commit",
    "clone of an image": "name create start verify commit",
    "commit": "copy-files difference commit-files image tag commit clean",
    "commit, frozen": "freeze commit-files thaw image tag commit clean",
    "create a volume": "store engine-volume commit",
    "grow a volume": "grow commit",
    "shrink a volume": "shrink commit",
    "shrink a volume by a copy": "make copy stop difference locate exchange start verify commit retire",
    "delete a volume": "check engine-volume destroy commit",
    "delete a volume that is mounted": "detach check engine-volume destroy commit",
    "adopt a volume": "commit",
    "adopt a copy of a volume": "store engine-volume copy commit",
}

# Steps that a shutdown cancels at once, and whose end a starting daemon does not wait for.
INTERRUPTIBLE = {"pull", "copy-files", "gather", "restore", "copy"}

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_BACKOFF_SECONDS", (0.0,))
    monkeypatch.setattr(operations, "_CANCEL_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(operations, "_RESUME_POLL_SECONDS", 0.001)


async def model_for(scenario: Scenario) -> ModelNode:
    model = ModelNode()
    await scenario.setup(model)
    model.check_consistency()
    model.engine.stop_timeouts.clear()
    model.engine.start_watch_seconds.clear()
    return model


async def undone(scenario: Scenario) -> list[dict[str, object]]:
    """What there may be after it has failed."""
    pictures = [(await model_for(scenario)).summary()]
    if scenario.or_as is not None:
        model = ModelNode()
        await scenario.or_as(model)
        pictures.append(model.summary())
    return pictures


async def done(scenario: Scenario) -> ModelNode:
    """The scenario without any fault."""
    model = await model_for(scenario)
    operation = await model.run_ok(scenario.command)
    assert operation.state is OperationState.SUCCEEDED
    return model


def is_plain(value: object) -> bool:
    """Whether it is what JSON has, as another process reads it, and not only equal to that."""
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and is_plain(one) for key, one in value.items())
    if isinstance(value, list):
        return all(is_plain(one) for one in value)
    return value is None or type(value) in {str, int, float, bool}


@every_scenario
async def test_it_is_done(scenario: Scenario) -> None:
    model = await done(scenario)
    model.check_consistency()
    scenario.check(model)
    (operation,) = [one.value for one in model.store.journal.values() if one.value.id == model.last_operation_id]
    names = [stage.name for stage in operation.stages]
    assert " ".join(names) == STAGES[scenario.name]
    for stage in operation.stages:
        assert stage.current_bytes == stage.total_bytes
    if "verify" in names:
        # A replacement for longer than what replaces nothing.
        assert model.engine.start_watch_seconds == [3 if "retire" in names else 2]
    if "carry" in names:
        assert operation.facts("carry") == {"method": "COPY" if scenario.name == "scale by copy" else "EXCHANGE"}
    # Another process makes the same of the record, as it was until the end.
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
@pytest.mark.parametrize("after", [False, True], ids=["", "but done"])
async def test_whatever_fails_is_undone(
    scenario: Scenario, act: Callable[[str], Awaitable[None]], *, after: bool
) -> None:
    good, bad = (await done(scenario)).summary(), await undone(scenario)
    failures = 0
    for at in range(1, MOST_CALLS):
        model = await model_for(scenario)
        model.faults.inject(at, act, after=after)
        try:
            operation = await model.run(scenario.command)
        except GpudockError:
            # Before it began.
            assert model.summary() == bad[0], model.faults.hit_call
            continue
        finally:
            model.check_consistency()
        if not model.faults.hit_call:
            break
        if operation.state is OperationState.FAILED:
            failures += 1
        await check_end(model, scenario, operation, bad, good)
    else:
        raise AssertionError("there is always one call more")
    assert failures or scenario.name == "adopt a volume", "no call of it can fail"


async def check_end(
    model: ModelNode, scenario: Scenario, operation: Operation, bad: list[dict[str, object]], good: dict[str, object]
) -> None:
    met = f"{model.faults.hit_call}, call {len(model.faults.calls)}: {operation.error or operation.message}"
    model.check_consistency()
    if operation.state is OperationState.SUCCEEDED:
        # What was noted is what is not as it should be.
        assert operation.message or model.summary() == good, met
        return
    assert operation.error is not None
    assert operation.error.reason != "INTERNAL", met
    if scenario.undone:
        assert model.summary() in bad, met
        return
    again = await model.run(scenario.command)
    assert again.state is OperationState.SUCCEEDED, met
    model.check_consistency()
    if scenario.rest is not None:
        scenario.rest(model)
    else:
        assert model.summary() == good, met


@every_scenario
async def test_what_is_cancelled_is_undone_or_done(scenario: Scenario) -> None:
    good, bad = (await done(scenario)).summary(), await undone(scenario)
    for at in range(1, MOST_CALLS):
        model = await model_for(scenario)
        cancelling: list[asyncio.Task[object]] = []

        async def cancel(
            name: str, model: ModelNode = model, cancelling: list[asyncio.Task[object]] = cancelling
        ) -> None:
            # What another operation does as its part is not the caller's.
            asked = [one for one in model.operations.active if not model.store.journal[one].value.request_id]
            cancelling += [asyncio.create_task(model.operations.cancel(one)) for one in asked]
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
            assert model.summary() in bad, model.faults.hit_call
        else:
            assert operation.state is OperationState.SUCCEEDED
            assert all(isinstance(one, OperationNotCancellable) for one in results), results
            assert model.summary() == good, model.faults.hit_call
    else:
        raise AssertionError("there is always one call more")


async def left_at(model: ModelNode, scenario: Scenario) -> str:
    """Begin it, and wait until it has met a fault that never returns, or its end; its id, empty if it never began."""
    beginning = asyncio.create_task(model.begin(scenario.command))
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        while not model.faults.blocked and not (beginning.done() and not model.operations.active):
            await asyncio.sleep(0)
    if beginning.done():
        return beginning.result()
    beginning.cancel()
    return ""


@every_scenario
@pytest.mark.parametrize("after", [False, True], ids=["", "but done"])
async def test_another_process_does_the_rest(scenario: Scenario, *, after: bool) -> None:
    good = (await done(scenario)).summary()
    for at in range(1, MOST_CALLS):
        model = await model_for(scenario)
        before = model.summary()
        model.faults.inject(at, model.faults.block, after=after)
        operation_id = await left_at(model, scenario)
        if not model.faults.hit_call:
            break
        await model.restart_daemon()
        model.check_consistency()
        if not operation_id:
            assert model.summary() == before
            continue
        assert model.store.journal[operation_id].value.state is OperationState.SUCCEEDED, model.faults.hit_call
        assert model.summary() == good, model.faults.hit_call
    else:
        raise AssertionError("there is always one call more")


@every_scenario
async def test_another_process_undoes_the_rest(scenario: Scenario) -> None:
    bad = await undone(scenario)
    for at in range(1, MOST_CALLS):
        model = await model_for(scenario)

        async def refuse(name: str, model: ModelNode = model, at: int = at) -> None:
            # The first call of the undoing, or the second …, is the last one of this process.
            model.faults.inject(1 + at % 4, model.faults.block, after=False)
            await REFUSED(name)

        model.faults.inject(at, refuse, after=True)
        try:
            operation_id = await left_at(model, scenario)
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
        if scenario.undone:
            assert model.summary() in bad, model.faults.hit_call
    else:
        raise AssertionError("there is always one call more")
