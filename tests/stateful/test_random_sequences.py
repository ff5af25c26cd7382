"""Random sequences of requests, faults, kills and docker commands, compared with the model after each step.

`--steps N` sets the total number of steps of the deep tests. A failure shows all steps of its sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from tests.conftest import FAST_FLAGS, own_state_flags
from tests.rig import Rig
from tests.run_report import REQUIRED
from tests.stateful.container_rules import ContainerRules
from tests.stateful.hang_report import hang_report
from tests.stateful.modelled_host import ModelledHost
from tests.stateful.other_rules import OtherRules
from tests.stateful.rule_base import COUNTED, DISTURBANCES
from tests.stateful.sequence_shrinker import Failure, Step, failure_location, shrink
from tests.stateful.volume_rules import VolumeRules

T = TypeVar("T")

# The steps of a sequence; each sequence has its own daemon and state.
_SEQUENCE = 50
_PARTS = 4
# The number of sequences of the everyday test, and their steps. In each sequence some of the rules are drawn often.
_SHORT, _SHORT_SEQUENCE = 3, 20
# With more sequences in one run, hypothesis mixes parts of them, which then have other outcomes.
_AT_ONCE = 10
# How long parts of a failed sequence are replayed to find a shorter one.
_SHRINK_SECONDS = 300
# From so many steps on, every rule and every disturbance must occur in some part of the test.
_STEPS_FOR_COVERAGE = 2000


class Loop:
    """An event loop in a thread, for rules, which hypothesis calls without an event loop."""

    def __init__(self, hangs_s: float = 120.0) -> None:
        """A coroutine that takes longer than `hangs_s` seconds is taken for hanging."""
        self._hangs_s = hangs_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.hang_report: Callable[[asyncio.AbstractEventLoop], str] = repr
        """Makes the report about a coroutine that hangs."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine; returns its result. Fails the test if it hangs."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self._hangs_s)
        except TimeoutError:
            if future.done():
                raise
            pytest.fail(f"it has not returned within {self._hangs_s:g} s\n{self.hang_report(self._loop)}")

    def close(self) -> None:
        """Cancel running tasks, and end the thread."""
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(self._hangs_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1)


class HostStateMachine(ContainerRules, VolumeRules, OtherRules):
    """The state machine with all rules, for one host with one daemon."""

    loop: Loop

    # The outcome of a kill is not drawn, and decides which rules can be drawn. Two sequences must not begin with the
    # same draws, or hypothesis reports them as inconsistent. Integers of this range are evenly distributed, larger ones
    # are not.
    @initialize(number=st.integers(0, (1 << 24) - 1))
    def begin(self, number: int) -> None:
        """Start a daemon without containers."""
        # Hypothesis first draws the simplest values: the same rule in every step.
        assume(number)
        self._proxy = self.rig.engine_proxy()
        self.loop.run(self._proxy.__aenter__())
        self._host = self.loop.run(ModelledHost.open(self.rig, self._proxy))
        self.loop.hang_report = lambda loop: hang_report(loop, self.host.daemon, self.rig)

    def teardown(self) -> None:
        """Delete everything, which must be possible in every state."""
        try:
            if self._host is not None:
                self.loop.run(self._host.close())
        except Exception as error:
            self.failures.append(Failure(tuple(self.steps), error))
            raise
        finally:
            if self._proxy is not None:
                self.loop.run(self._proxy.__aexit__(None, None, None))
            self.rig.engine.remove_all()


@pytest.mark.timeout(600)
def test_short_sequences_agree_with_the_model(rig: Rig) -> None:
    tally = _play_sequences(rig, "Short", _SHORT, _SHORT_SEQUENCE)
    assert tally["steps"]


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(_PARTS))
def test_sequences_agree_with_the_model(rig: Rig, request: pytest.FixtureRequest, part: int) -> None:
    steps = int(request.config.getoption("--steps"))
    tally = _play_sequences(rig, str(part), max(1, -(-steps // _PARTS // _SEQUENCE)), _SEQUENCE)
    if steps >= _STEPS_FOR_COVERAGE:
        occurrences = {name: tally[name] for name in (*DISTURBANCES, *(f"rule {name}" for name in COUNTED))}
        request.node.user_properties.append((REQUIRED, {"parts": _PARTS, "counts": occurrences}))


def _play_sequences(rig: Rig, name: str, sequences: int, steps: int) -> Counter[str]:
    """Play random sequences of `steps` steps each; returns how often each rule and each disturbance occurred.

    Raises the first error, with the steps of its sequence in a note.
    """
    loop = Loop()
    tally: Counter[str] = Counter()
    failures: list[Failure] = []
    kind = type(
        f"HostStateMachine{name}", (HostStateMachine,), {"rig": rig, "loop": loop, "tally": tally, "failures": failures}
    )
    try:
        for done in range(0, sequences, _AT_ONCE):
            run_state_machine_as_test(
                kind,
                settings=settings(
                    max_examples=min(_AT_ONCE, sequences - done),
                    stateful_step_count=steps,
                    # Hypothesis cannot shorten these sequences; see `sequence_shrinker`.
                    phases=[Phase.generate],
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    verbosity=Verbosity.normal,
                ),
            )
    except Exception:
        # Hypothesis replays a failed sequence once, and raises the error of the replay.
        if not failures:
            raise
        first = failures[0]
        first.error.add_note(_describe(first, kind))
        raise first.error from None
    finally:
        loop.close()
        print(f"\nmet: {dict(sorted(tally.items()))}")  # noqa: T201 - pytest shows it with a failure, and with -s
    return tally


def _describe(failure: Failure, kind: type[HostStateMachine]) -> str:
    """The steps of a failure, and the shortest part of them that fails alike."""
    steps = "\n".join(f"  {step}" for step in failure.steps)
    where = failure_location(failure.error)

    def fails(part: Sequence[Step]) -> bool:
        again = _replay(part, kind)
        return again is not None and failure_location(again.error) == where

    shrunk = shrink(failure.steps, fails, _SHRINK_SECONDS)
    return f"the sequence that failed has these steps:\n{steps}\n{shrunk}"


def _replay(steps: Sequence[Step], kind: type[HostStateMachine]) -> Failure | None:
    """Replay these steps on a new host; returns the first failure. See `RuleBase.follow`."""
    machine, earlier = kind(), len(kind.failures)
    # The errors are recorded as failures of the state machine.
    with contextlib.suppress(Exception):
        try:
            machine.begin(number=1)
            for step in steps:
                machine.follow(step)
        finally:
            machine.teardown()
    return next(iter(kind.failures[earlier:]), None)


def test_a_hanging_step_is_reported_with_stacks(rig: Rig) -> None:
    loop = Loop(hangs_s=0.2)
    daemon = rig.daemon(*FAST_FLAGS, *own_state_flags())
    loop.hang_report = lambda running: hang_report(running, daemon, rig)
    try:
        with pytest.raises(pytest.fail.Exception) as failure:
            loop.run(_wait_forever())
    finally:
        loop.close()
        daemon.stop()
    shown = str(failure.value)
    for part in ("in _wait_forever", "task dump complete", "goroutine 1 ", rig.id, " dockerd S "):
        assert part in shown


async def _wait_forever() -> None:
    await asyncio.Event().wait()
