"""Kills daemons at the moments of operations (see `instrumented_daemon`), and reports the moments found and tried.

A `KillScenario` says which operation is requested and what must be true afterwards. A `DaemonKiller` has a method for
each way to kill the daemon: at one moment or at every moment on the way forward, while the operation is undone, and a
second time while the next daemon recovers.

A daemon that survives prints all moments of the operation. A sample of them is tried; its seed is shown in the report
of the run and set by GPUDOCK_MOMENTS_SEED. With GPUDOCK_ALL_MOMENTS=1 every moment is tried.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tests.calls import Caller
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.faults.instrumented_daemon import BY_CHILDREN, DELAY_MS, DIE_AT, DURING, KIND, LASTING, PHASE, REFUSAL, Phase
from tests.rig import Daemon, Rig
from tests.rig.patience import in_time, least_patience, limit

ALL = os.environ.get("GPUDOCK_ALL_MOMENTS", "") not in ("", "0")
SEED = os.environ.get("GPUDOCK_MOMENTS_SEED") or uuid.uuid4().hex[:8]
# How many moments are tried: between calls, during calls, while undoing, and before a recovery.
_DRAWN_BETWEEN, _DRAWN_DURING, _DRAWN_UNDOING, _DRAWN_RECOVERING = 4, 2 if least_patience() == 1 else 1, 1, 1
# More moments than any operation has, so that an operation that never ends fails the test.
_MOST_MOMENTS = 200
_MOST_DRAWN_AGAIN = 5
_DELAYS_MS = (0, 2, 5, 10, 20, 50, 100)
_CHILDREN_SECONDS = 15.0
_SERVING_SECONDS = 60.0
_OPERATION_SECONDS = 120.0
# Stages that change nothing, or may have nothing to change.
_STAGES_WITHOUT_CHANGE = frozenset({"locate", "verify", "check", "prune", "commit"})
_COMMIT = "commit"
# Child processes that may outlive their daemon for a while.
_SURVIVORS = frozenset({"etcd"})

Act = Callable[[Caller], Awaitable[object]]
Check = Callable[[Caller], Awaitable[None]]


@dataclass(frozen=True)
class KillScenario:
    """An operation that can be requested repeatedly.

    `act` requests one operation of `kind`, in any state after the operation before; it prepares what that needs.
    `check` asserts what must be true when no operation is running, and begins no operation of `kind`.
    """

    kind: str
    act: Act
    check: Check
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moment:
    """A moment, as a daemon prints it. `number` begins with `during ` for a moment during a call or a child process."""

    number: str
    stage: str
    name: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.name}"

    def after(self, first: Moment) -> Moment:
        """This moment as one of the recovery after a kill at `first`."""
        return Moment(self.number, self.stage, f"{self.name} (after a death at {first})")


@dataclass
class MomentLog:
    """What a daemon has printed about an operation."""

    text: str
    stages: tuple[str, ...] = field(init=False)
    moments: list[Moment] = field(init=False)

    def __post_init__(self) -> None:
        stages = re.search(r"^stages: (.*)$", self.text, re.MULTILINE)
        self.stages = tuple(stages[1].split()) if stages else ()
        found = re.findall(r"^moment ((?:during )?\d+) \[(.*?)\]: (.*)$", self.text, re.MULTILINE)
        self.moments = [Moment(*fields) for fields in found]

    @property
    def between(self) -> list[Moment]:
        """The moments between two calls."""
        return [moment for moment in self.moments if not moment.number.startswith(DURING)]

    @property
    def during(self) -> list[Moment]:
        """The moments during a call or a child process."""
        return [moment for moment in self.moments if moment.number.startswith(DURING)]

    @property
    def killed_at(self) -> Moment | None:
        """The moment at which the daemon was killed; None if it was not."""
        found = re.search(r"^dying at moment ((?:during )?\d+) \[(.*?)\]: (.*)$", self.text, re.MULTILINE)
        return Moment(*found.groups()) if found else None

    @property
    def children(self) -> dict[int, str]:
        """The child processes that were running when the daemon was killed: names by process id."""
        lines = re.findall(r"^children: (.*)$", self.text, re.MULTILINE)
        pairs = (entry.partition(":") for entry in (lines[-1].split() if lines else ()))
        return {int(pid): name for pid, _, name in pairs if name not in _SURVIVORS}


def missing_moments(stages: Sequence[str], moments: Sequence[Moment]) -> list[str]:
    """The moments that an operation with these stages must have, and that are not among `moments`.

    These are a record of its begin, of each stage and of its end, and a change in each stage that changes something.
    """
    names, changed = (
        {moment.name for moment in moments},
        {moment.stage for moment in moments if "record of" not in moment.name},
    )
    required = [f"before record of RUNNING after {stage}" for stage in ("nothing", *_recorded(stages))]
    required += [f"{when} record of SUCCEEDED after {stages[-1]}" for when in ("before", "after")]
    lacking = [name for name in required if name not in names]
    return lacking + [
        f"a change in {stage}" for stage in stages if stage not in _STAGES_WITHOUT_CHANGE and stage not in changed
    ]


def calls_without_moment(moments: Sequence[Moment]) -> list[str]:
    """The calls of LASTING and BY_CHILDREN that have no moment during the call."""
    lasting = {port.__name__ for port in LASTING}
    lacking = []
    for moment, following in zip(moments, (*moments[1:], None), strict=True):
        call = moment.name.removeprefix("before ")
        within = following is not None and following.number.startswith(DURING)
        if (call.partition(".")[0] in lasting or call in BY_CHILDREN) and call != moment.name and not within:
            lacking.append(f"a moment in the midst of {call}")
    return lacking


def minimum_moments(stages: Sequence[str]) -> int:
    """The minimum number of moments between calls of an operation with these stages; see `missing_moments`."""
    return len(_recorded(stages)) + 3 + len([stage for stage in stages if stage not in _STAGES_WITHOUT_CHANGE])


def _recorded(stages: Sequence[str]) -> Sequence[str]:
    """The stages whose record does not end the operation: all, except a commit that is the last stage."""
    return stages[:-1] if stages[-1] == _COMMIT else stages


def missing_undo_moments(stages: Sequence[str], moments: Sequence[Moment]) -> list[str]:
    """As `missing_moments`, for an undo of all steps: a record of its begin, of each step, and of its end."""
    steps = stages[: stages.index(_COMMIT)]
    undone = [moment for moment in moments if moment.name.startswith("before record of UNDOING")]
    ends = [moment for moment in moments if re.match("(before|after) record of (FAILED|CANCELLED)", moment.name)]
    lacking = [] if len(undone) == len(steps) + 1 else [f"{len(steps) + 1} records of UNDOING, but {len(undone)}"]
    return lacking + ([] if len(ends) == 2 else ["the records of its end"])


class DaemonKiller:
    """Kills daemons that only one test uses, and starts their successors."""

    def __init__(self, rig: Rig, seed: str) -> None:
        self._rig = rig
        self._random = random.Random(seed)  # noqa: S311 - the choice must be repeatable
        self._own = own_state_flags()
        self._daemon: Daemon | None = None
        self.report: dict[str, object] = {"seed": SEED, "known": [], "tried": [], "seconds": 0.0}
        self._begun = time.monotonic()

    # -- ways to kill ------------------------------------------------------------------------------------------------

    async def kill_at_one_moment(self, scenario: KillScenario) -> None:
        """Kill at one moment on the way forward, between two calls or during one."""
        log = await self._uninterrupted_log(scenario)
        killed = None
        for _ in range(_MOST_DRAWN_AGAIN):
            # A repeated operation can have fewer moments than the first; the daemon survives then.
            killed = await self._run_once(scenario, self._random.choice(self._log.moments).number)
            if killed is not None:
                break
        await self._restart_and_check(scenario, "")
        assert killed is not None
        self._report(scenario.kind, log.moments, [killed], minimum_moments(log.stages))

    async def kill_at_every_moment(self, scenario: KillScenario) -> None:
        """Kill at several moments on the way forward, between calls and during them."""
        log, tried = await self._uninterrupted_log(scenario), []
        known = list(log.moments)
        for moment in (*self._sample(log.between, _DRAWN_BETWEEN), *self._sample(log.during, _DRAWN_DURING)):
            killed = await self._run_once(scenario, moment.number)
            tried += [killed] if killed else []
        # A repeated operation can also have more moments than the first.
        number = len(log.between) + 1
        while ALL and (killed := await self._run_once(scenario, str(number))) is not None:
            tried.append(killed)
            known.append(killed)
            number += 1
            assert number < _MOST_MOMENTS, f"the operation has not ended after {number} moments"
        assert tried
        await self._restart_and_check(scenario, "")
        self._report(scenario.kind, known, tried, minimum_moments(log.stages))

    async def kill_while_undoing(self, scenario: KillScenario) -> None:
        """Kill at moments of the undo, which begins when all steps before the commit are done."""
        assert await self._run_once(scenario, "", Phase.UNDOING) is None
        log, tried = self._log, []
        lacking = missing_undo_moments(log.stages, log.between) + calls_without_moment(log.moments)
        assert not lacking, (lacking, log.stages, log.moments)
        for moment in self._sample(log.moments, _DRAWN_UNDOING):
            killed = await self._run_once(scenario, moment.number, Phase.UNDOING)
            tried += [killed] if killed else []
        await self._restart_and_check(scenario, "")
        assert tried
        self._report(scenario.kind, log.moments, tried, log.stages.index(_COMMIT) + 3)

    async def kill_while_recovering(self, scenario: KillScenario) -> None:
        """Kill at a moment on the way forward, and then at one of the recovery by the next daemon."""
        assert await self._run_once(scenario, "") is None
        forward, tried = self._log.between, []
        known: dict[tuple[str, str], Moment] = {}

        async def twice(first: Moment, second: str) -> Moment | None:
            assert await self._run_once(scenario, first.number) is not None, f"the daemon was not killed at {first}"
            killed = await self._recover(scenario, second)
            known.update({(first.number, moment.number): moment.after(first) for moment in self._log.moments})
            tried.extend([killed.after(first)] if killed else [])
            return killed

        # After the last record there is nothing to recover.
        for first in self._sample(forward[1:-1], _DRAWN_RECOVERING):
            if not ALL:
                second = self._random.choice(("", DURING)) + str(self._random.randint(1, len(forward)))
                for _ in range(_MOST_DRAWN_AGAIN):
                    if await twice(first, second) is not None:
                        break
                    # The recovery had fewer moments; choose one that it had.
                    second = self._random.choice(self._log.moments).number
                continue
            for group in ("", DURING):
                number = 1
                while await twice(first, f"{group}{number}") is not None:
                    number += 1
                    assert number < _MOST_MOMENTS, f"the recovery has not ended after {number} moments"
        await self._restart_and_check(scenario, "")
        assert tried
        self._report(scenario.kind, list(known.values()), tried, 1)

    async def _uninterrupted_log(self, scenario: KillScenario) -> MomentLog:
        """The log of a daemon that survives the operation; asserts that it has all moments that it must have."""
        assert await self._run_once(scenario, "") is None
        log = self._log
        lacking = missing_moments(log.stages, log.between) + calls_without_moment(log.moments)
        assert not lacking, (lacking, log.stages, log.moments)
        return log

    # -- one daemon --------------------------------------------------------------------------------------------------

    async def _run_once(self, scenario: KillScenario, die_at: str, phase: Phase = Phase.BEGUN) -> Moment | None:
        """Start a daemon that recovers, request the operation, and kill the daemon at `die_at`; None if it survives."""
        await self._restart_and_check(scenario, die_at, phase)
        return await self._act(scenario)

    async def _restart_and_check(self, scenario: KillScenario, die_at: str, phase: Phase = Phase.BEGUN) -> None:
        """Start the next daemon, and run the scenario's check once its recovery has ended."""
        before = self._daemon is not None
        await self._start(scenario, die_at, phase)
        if before:
            async with Caller(self._running.target) as caller, self._in_time("no end of the operations"):
                await caller.until_idle()
                await scenario.check(caller)

    async def _act(self, scenario: KillScenario) -> Moment | None:
        """Request the operation; returns the moment at which the daemon was killed, or None."""
        async with (
            Caller(self._running.target) as caller,
            self._in_time("no end and no kill of the operation"),
        ):
            try:
                await scenario.act(caller)
            except grpc.aio.AioRpcError as error:
                if REFUSAL in (error.details() or ""):
                    return None
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017 - any other code fails the test
                return await self._wait_for_death()
        return None

    async def _wait_for_death(self) -> Moment:
        assert await asyncio.to_thread(self._running.wait) == -9, self._running.log_text
        moment = self._log.killed_at
        assert moment is not None, self._running.log_text
        print(f"killed at {moment}")  # noqa: T201 - pytest shows it with a failure
        await require_children_exit(self._log.children)
        return moment

    async def _recover(self, scenario: KillScenario, die_at: str) -> Moment | None:
        """Start the next daemon and kill it at `die_at` of its recovery; returns that moment, None if it survives."""
        await self._start(scenario, die_at, Phase.RESUMED, serving=False)
        deadline = time.monotonic() + limit(_SERVING_SECONDS)
        while self._running.running and not await asyncio.to_thread(self._running.serving):
            assert time.monotonic() < deadline, f"the daemon is not serving: {self._running.log_text}"
            await asyncio.sleep(0.02)
        try:
            async with (
                Caller(self._running.target) as caller,
                self._in_time("no end and no kill of the recovery"),
            ):
                await caller.until_idle()
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017 - any other code fails the test
            return await self._wait_for_death()
        return None if self._running.running else await self._wait_for_death()

    async def _start(
        self, scenario: KillScenario, die_at: str, phase: Phase = Phase.BEGUN, *, serving: bool = True
    ) -> None:
        before = self._daemon
        if before is not None and before.running:
            await asyncio.to_thread(before.stop)
        delay = self._random.choice(_DELAYS_MS)
        self._daemon = await self._rig.start_daemon(
            *FAST_FLAGS,
            *scenario.flags,
            *self._own,
            module="tests.faults.instrumented_daemon",
            environment={KIND: scenario.kind, DIE_AT: die_at, PHASE: phase, DELAY_MS: str(delay)},
            state_dir=before.state_dir if before else None,
            socket=before.socket if before else None,
            serving=serving,
        )

    async def end(self) -> None:
        """Stop the daemon."""
        if self._daemon is not None:
            await asyncio.to_thread(self._daemon.stop)

    def _in_time(self, otherwise: str) -> AbstractAsyncContextManager[None]:
        """Fail if a block takes longer than any operation should."""
        return in_time(otherwise, _OPERATION_SECONDS, lambda: self._running.log_text)

    @property
    def _running(self) -> Daemon:
        assert self._daemon is not None
        return self._daemon

    @property
    def _log(self) -> MomentLog:
        return MomentLog(self._running.log_text)

    # -- the choice of moments ---------------------------------------------------------------------------------------

    def _sample(self, moments: Sequence[Moment], most: int) -> list[Moment]:
        """A random choice of `most` moments, in their order; all with GPUDOCK_ALL_MOMENTS."""
        chosen = set(self._random.sample(range(len(moments)), min(most, len(moments))))
        return [moment for index, moment in enumerate(moments) if ALL or index in chosen]

    def _report(self, kind: str, known: Collection[Moment], tried: Collection[Moment], minimum: int) -> None:
        assert len(known) >= minimum
        self.report |= {
            "kind": kind,
            "known": [str(moment) for moment in known],
            "tried": [str(moment) for moment in tried],
            "least": minimum,
            "seconds": round(time.monotonic() - self._begun, 1),
        }


async def require_children_exit(children: dict[int, str], seconds: float = _CHILDREN_SECONDS) -> None:
    """Assert that the child processes of a killed daemon end, so that none changes what the next daemon uses."""
    deadline = time.monotonic() + limit(seconds)
    while running := [f"{pid} {name}" for pid, name in children.items() if _is_running(pid)]:
        assert time.monotonic() < deadline, f"children outlive their daemon: {running}"
        await asyncio.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state not in (b"Z", b"X")
