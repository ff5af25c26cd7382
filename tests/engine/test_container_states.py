"""Every mutation in every state of a container: allowed with the next state, or refused, as the contract says."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock_server.model.container import ContainerState as RecordedState
from gpudock_server.model.store_changes import PutContainer

from tests.calls import IDLE, Caller, failure_of
from tests.engine.drift import docker_inspect, engine_action, state_of
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, read_to_end, until, until_state
from tests.rig import EngineProxy, Rig
from tests.rig.patience import limit
from tests.selection import deep_except

__all__ = ["daemons"]

NAME = "subject"
UNLESS_STOPPED = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_UNLESS_STOPPED)
ABSENT = "gone"


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

# State -> mutation -> the state afterwards (ABSENT if deleted), or the reason of the error.
OUTCOMES: dict[str, dict[str, str]] = {
    "RUNNING": dict.fromkeys(MUTATIONS, "RUNNING")
    | {
        "pause": "PAUSED",
        "unpause": "CONTAINER_NOT_PAUSED",
        "delete": "CONTAINER_RUNNING",
        "start with gpus": "CONTAINER_RUNNING",
        "stop": "STOPPED",
        "delete with force": ABSENT,
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
        "delete with force": ABSENT,
    },
    "STOPPED": dict.fromkeys(MUTATIONS, "STOPPED")
    | {
        "exec": "CONTAINER_NOT_RUNNING",
        "scale gpus": "CONTAINER_NOT_RUNNING",
        "pause": "CONTAINER_NOT_RUNNING",
        "unpause": "CONTAINER_NOT_PAUSED",
        "delete": ABSENT,
        "start": "RUNNING",
        "start with gpus": "RUNNING",
        "restart": "RUNNING",
        "delete with force": ABSENT,
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
        "delete with force": ABSENT,
    },
}
OUTCOMES["EXITED"] = {
    mutation: "EXITED" if outcome == "STOPPED" else outcome for mutation, outcome in OUTCOMES["STOPPED"].items()
}
# A FAILED container whose engine container exists again gets the state of the engine.
OUTCOMES["FAILED"] = OUTCOMES["EXITED"]
# Another operation holds the lock of the container. An exec needs no lock, but a running process.
OUTCOMES_WHILE_LOCKED = dict.fromkeys(MUTATIONS, "CONTAINER_BUSY") | {"exec": "CONTAINER_NOT_RUNNING"}


async def outcome_of(call: Awaitable[Any]) -> str:
    """The reason of the error of a call; empty if it succeeds."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        refused = failure_of(error)
        assert "None" not in refused.message
        return refused.reason
    return ""


async def current_state(caller: Caller) -> str:
    """The state of the container; ABSENT if it does not exist."""
    listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
    state = next((container.status.state for container in listed.containers if container.name == NAME), None)
    if state is None:
        return ABSENT
    return container_pb2.ContainerState.Name(state).removeprefix("CONTAINER_STATE_")


class Subject:
    """The container that the mutations are called for."""

    def __init__(self, caller: Caller, rig: Rig, fail: Callable[[], Awaitable[None]]) -> None:
        """`fail` records the container as FAILED."""
        self._caller = caller
        self._rig = rig
        self._fail = fail

    async def create_in_state(self, state: str) -> None:
        """Delete the container, and create it at revision 2 in a state."""
        caller = self._caller
        if await current_state(caller) != ABSENT:
            await caller.delete(NAME)
        crashes = state == "RESTARTING"
        fields: dict[str, Any] = (
            {"command": ("sh", "-c", "exit 3"), "restart_policy": UNLESS_STOPPED} if crashes else {}
        )
        await caller.create(NAME, **({"command": IDLE} | fields))
        created = await caller.update(NAME, labels={"team": "vision"})
        match state:
            case "PAUSED":
                await _pause(caller)
            case "STOPPED" | "FAILED":
                await caller.stop(NAME)
            case "EXITED":
                await asyncio.to_thread(engine_action, self._rig, created.status.engine_id, "kill")
        if state == "FAILED":
            # A late event of the stop makes the daemon record the state of the engine.
            while await current_state(caller) != state:
                await self._fail()
                await asyncio.sleep(0.1)
        await self.await_state(state)

    async def await_state(self, state: str) -> None:
        """Wait until the container is in a state."""
        if state == ABSENT:
            assert await current_state(self._caller) == ABSENT
        else:
            await until_state(self._caller, NAME, container_pb2.ContainerState.Value(f"CONTAINER_STATE_{state}"))

    async def wait_for_restart_delay(self) -> None:
        """Wait until the engine waits before its next restart; the delay is long after several restarts."""
        engine_id = (await self._caller.get(NAME)).status.engine_id

        async def waits() -> bool:
            shown = await asyncio.to_thread(docker_inspect, self._rig, engine_id)
            return bool(shown["State"]["Restarting"]) and int(shown["RestartCount"]) > 2

        await until(waits)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("state", deep_except(["RUNNING"], OUTCOMES))
async def test_mutations_in_each_state(daemons: IsolatedDaemons, rig: Rig, state: str) -> None:
    # A comparison must not replace the FAILED record. A process that crashes may take longer than FAST_FLAGS allow.
    flags = ("--settle-period", f"{limit(1):.1f}") if state == "RESTARTING" else ()
    daemon = await daemons.start("--reconcile-interval", "600", *flags)

    async def fail() -> None:
        async with state_of(daemons, rig) as stored:
            view = await stored.store.container(NAME)
            assert view is not None
            failed = view.container.with_status(state=RecordedState.FAILED, message="it was lost for a while")
            await stored.store.apply([PutContainer(failed, expect=view.version)])

    async with Caller(daemon.target) as caller:
        subject = Subject(caller, rig, fail)
        violations = []
        for mutation, expected in OUTCOMES[state].items():
            if await current_state(caller) != state:
                await subject.create_in_state(state)
            if (state, mutation) == ("RESTARTING", "exec"):
                await subject.wait_for_restart_delay()
            reason = await outcome_of(MUTATIONS[mutation](caller))
            allowed = expected == ABSENT or expected in {state.value for state in RecordedState}
            if reason != ("" if allowed else expected):
                violations.append(f"{mutation}: {reason or await current_state(caller)} instead of {expected}")
                continue
            # A refused or undone mutation leaves the state unchanged.
            await subject.await_state(expected if allowed else state)
            if mutation == "clone" and not reason:
                await caller.delete("copy")
        assert not violations, f"{state}: {violations}"
        await caller.delete_all()
    assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest.mark.parametrize(
    ("state", "call"), [("CREATING", ("POST", "/containers/create")), ("DELETING", ("DELETE", "/containers/[0-9a-f]+"))]
)
async def test_mutations_are_refused_during_create_and_delete(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy, state: str, call: tuple[str, str]
) -> None:
    daemon = await daemons.start(docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        if state == "DELETING":
            await caller.create(NAME)
        hang = engine_proxy.faults.hang(*call)
        operation = asyncio.ensure_future(caller.create(NAME) if state == "CREATING" else caller.delete(NAME))
        await hang.hit.wait()
        assert await current_state(caller) == state
        outcomes = {mutation: await outcome_of(make(caller)) for mutation, make in MUTATIONS.items()}
        assert outcomes == OUTCOMES_WHILE_LOCKED
        request = container_service_pb2.ScaleContainerRequest(name=NAME, cpus=0.5, validate_only=True)
        assert await outcome_of(read_to_end(caller.containers.ScaleContainer(request))) == "CONTAINER_BUSY"
        hang.release()
        await operation
        await caller.delete_all()
