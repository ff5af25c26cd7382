"""Which mutation is allowed in which state, and what comes of it: what the comments of the contract promise."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock_server.model.container import ContainerState as Recorded
from gpudock_server.model.store_changes import PutContainer

from tests.calls import IDLE, Caller, failure_of
from tests.engine.drift import docker_inspect, engine_action, state_of
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until, until_state
from tests.rig import EngineProxy, Rig
from tests.rig.patience import limit
from tests.selection import deep_except

__all__ = ["daemons"]

NAME = "subject"
UNLESS_STOPPED = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_UNLESS_STOPPED)
GONE = "gone"


def _pause(caller: Caller) -> Awaitable[Any]:
    return caller.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name=NAME))


def _unpause(caller: Caller) -> Awaitable[Any]:
    return caller.containers.UnpauseContainer(container_service_pb2.UnpauseContainerRequest(name=NAME))


MUTATIONS: dict[str, Callable[[Caller], Awaitable[Any]]] = {
    "exec": lambda caller: caller.run(NAME, "true"),
    "commit": lambda caller: caller.commit(NAME, f"states/{uuid.uuid4()}"),
    "clone": lambda caller: caller.clone(NAME, "copy"),
    "scale cpus": lambda caller: caller.scale(NAME, cpus=0.5),
    "update labels": lambda caller: caller.update(NAME, labels={"a": "b"}),
    "update env": lambda caller: caller.update(NAME, env={"A": "b"}),
    "scale gpus": lambda caller: caller.scale(NAME, 1),
    "rollback": lambda caller: caller.rollback(NAME, 1),
    "delete revision": lambda caller: caller.delete_revision(NAME, 1),
    "pause": _pause,
    "unpause": _unpause,
    "delete": lambda caller: caller.delete(NAME, force=False),
    "start": lambda caller: caller.start(NAME),
    "start with gpus": lambda caller: caller.start(NAME, 2),
    "restart": lambda caller: caller.restart(NAME),
    "stop": lambda caller: caller.stop(NAME),
    "delete with force": lambda caller: caller.delete(NAME),
}

# The state that it is in afterwards, or the reason of the error.
TABLE: dict[str, dict[str, str]] = {
    "RUNNING": dict.fromkeys(MUTATIONS, "RUNNING")
    | {
        "pause": "PAUSED",
        "unpause": "CONTAINER_NOT_PAUSED",
        "delete": "CONTAINER_RUNNING",
        "start with gpus": "CONTAINER_RUNNING",
        "stop": "STOPPED",
        "delete with force": GONE,
    },
    "PAUSED": dict.fromkeys(MUTATIONS, "CONTAINER_PAUSED")
    | {
        "commit": "PAUSED",
        "clone": "PAUSED",
        "delete revision": "PAUSED",
        "unpause": "RUNNING",
        "delete": "CONTAINER_RUNNING",
        "restart": "RUNNING",
        "stop": "STOPPED",
        "delete with force": GONE,
    },
    "STOPPED": dict.fromkeys(MUTATIONS, "STOPPED")
    | {
        "exec": "CONTAINER_NOT_RUNNING",
        "scale gpus": "CONTAINER_NOT_RUNNING",
        "pause": "CONTAINER_NOT_RUNNING",
        "unpause": "CONTAINER_NOT_PAUSED",
        "delete": GONE,
        "start": "RUNNING",
        "start with gpus": "RUNNING",
        "restart": "RUNNING",
        "delete with force": GONE,
    },
    "RESTARTING": dict.fromkeys(MUTATIONS, "RESTARTING")
    | {
        "exec": "CONTAINER_NOT_RUNNING",
        "update env": "START_FAILED",
        "scale gpus": "START_FAILED",
        "rollback": "START_FAILED",
        "pause": "CONTAINER_NOT_RUNNING",
        "unpause": "CONTAINER_NOT_PAUSED",
        "delete": "CONTAINER_RUNNING",
        "start with gpus": "CONTAINER_RUNNING",
        "stop": "STOPPED",
        "delete with force": GONE,
    },
}
TABLE["EXITED"] = {
    mutation: "EXITED" if outcome == "STOPPED" else outcome for mutation, outcome in TABLE["STOPPED"].items()
}
# Its engine container is there again: it is as the engine shows it.
TABLE["FAILED"] = TABLE["EXITED"]
# An operation is at work. An exec is none, and has nothing to wait for.
BUSY = dict.fromkeys(MUTATIONS, "CONTAINER_BUSY") | {"exec": "CONTAINER_NOT_RUNNING"}


async def outcome_of(call: Awaitable[Any]) -> str:
    """The reason of its error; empty where it succeeds."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        refused = failure_of(error)
        assert "None" not in refused.message
        return refused.reason
    return ""


async def state_now(caller: Caller) -> str:
    """The state of the container, or that it is gone."""
    listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
    state = next((one.status.state for one in listed.containers if one.name == NAME), None)
    if state is None:
        return GONE
    return container_pb2.ContainerState.Name(state).removeprefix("CONTAINER_STATE_")


class Subject:
    """The container that everything is done to."""

    def __init__(self, caller: Caller, rig: Rig, fail: Callable[[], Awaitable[None]]) -> None:
        """`fail` records it as FAILED."""
        self._caller = caller
        self._rig = rig
        self._fail = fail

    async def bring(self, state: str) -> None:
        """Make it anew, at revision 2 and in a state."""
        caller = self._caller
        if await state_now(caller) != GONE:
            await caller.delete(NAME)
        loops = state == "RESTARTING"
        fields: dict[str, Any] = {"command": ("sh", "-c", "exit 3"), "restart_policy": UNLESS_STOPPED} if loops else {}
        await caller.create(NAME, **({"command": IDLE} | fields))
        made = await caller.update(NAME, labels={"team": "vision"})
        match state:
            case "PAUSED":
                await _pause(caller)
            case "STOPPED" | "FAILED":
                await caller.stop(NAME)
            case "EXITED":
                await asyncio.to_thread(engine_action, self._rig, made.status.engine_id, "kill")
        if state == "FAILED":
            # An event of the stop may still come, and the record follows the engine then.
            while await state_now(caller) != state:
                await self._fail()
                await asyncio.sleep(0.1)
        await self.await_state(state)

    async def await_state(self, state: str) -> None:
        """Wait until it is shown in a state."""
        if state == GONE:
            assert await state_now(self._caller) == GONE
        else:
            await until_state(self._caller, NAME, container_pb2.ContainerState.Value(f"CONTAINER_STATE_{state}"))

    async def between_runs(self) -> None:
        """Wait until the engine waits to start it, and will for a while."""
        engine_id = (await self._caller.get(NAME)).status.engine_id

        async def waits() -> bool:
            shown = await asyncio.to_thread(docker_inspect, self._rig, engine_id)
            return bool(shown["State"]["Restarting"]) and int(shown["RestartCount"]) > 2

        await until(waits)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("state", deep_except(["RUNNING"], TABLE))
async def test_what_a_state_allows(daemons: IsolatedDaemons, rig: Rig, state: str) -> None:
    # A record that was put there by hand has to stay; and a process that crashes has to be seen to, also on a busy
    # machine.
    settle = ("--settle-period", f"{limit(1):.1f}") if state == "RESTARTING" else ()
    daemon = await daemons.start("--reconcile-interval", "600", *settle)

    async def fail() -> None:
        async with state_of(daemons, rig) as kept:
            view = await kept.store.container(NAME)
            assert view is not None
            failed = view.container.with_status(state=Recorded.FAILED, message="it was lost for a while")
            await kept.store.apply([PutContainer(failed, expect=view.version)])

    async with Caller(daemon.target) as caller:
        subject = Subject(caller, rig, fail)
        wrong = []
        for mutation, expected in TABLE[state].items():
            if await state_now(caller) != state:
                await subject.bring(state)
            if (state, mutation) == ("RESTARTING", "exec"):
                await subject.between_runs()
            reason = await outcome_of(MUTATIONS[mutation](caller))
            allowed = expected == GONE or expected in {one.value for one in Recorded}
            if reason != ("" if allowed else expected):
                wrong.append(f"{mutation}: {reason or await state_now(caller)} instead of {expected}")
                continue
            # What is refused, or undone, leaves it as it was.
            await subject.await_state(expected if allowed else state)
            if mutation == "clone" and not reason:
                await caller.delete("copy")
        assert not wrong, f"{state}: {wrong}"
        await caller.delete_all()
    assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest.mark.parametrize(
    ("state", "call"), [("CREATING", ("POST", "/containers/create")), ("DELETING", ("DELETE", "/containers/[0-9a-f]+"))]
)
async def test_nothing_is_done_to_one_that_is_being_created_or_deleted(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy, state: str, call: tuple[str, str]
) -> None:
    daemon = await daemons.start(docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        if state == "DELETING":
            await caller.create(NAME)
        hang = engine_proxy.faults.hang(*call)
        work = asyncio.ensure_future(caller.create(NAME) if state == "CREATING" else caller.delete(NAME))
        await hang.hit.wait()
        assert await state_now(caller) == state
        found = {mutation: await outcome_of(make(caller)) for mutation, make in MUTATIONS.items()}
        assert found == BUSY
        plan = container_service_pb2.ScaleContainerRequest(name=NAME, cpus=0.5, validate_only=True)
        assert await outcome_of(_drained(caller.containers.ScaleContainer(plan))) == "CONTAINER_BUSY"
        hang.release()
        await work
        await caller.delete_all()


async def _drained(stream: Any) -> None:
    async for _ in stream:
        pass
