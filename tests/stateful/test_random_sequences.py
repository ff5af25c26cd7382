"""Random sequences of requests, faults, kills and outside commands: whatever happens, the model holds.

`--steps N` says how many steps the deep tests take in all; a failure shows every step of the sequence that led to it.
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

# One sequence; each has a daemon and a state of its own.
_SEQUENCE = 50
_PARTS = 4
# How many sequences the everyday test plays, and how many steps each has: in each, some of the rules are drawn often.
_SHORT, _SHORT_SEQUENCE = 3, 20
# Of more, hypothesis plays parts of one in another, where they would go otherwise.
_AT_ONCE = 10
# How long parts of a sequence that has failed are played, to find a shorter one.
_SHRINK_SECONDS = 300
# From so many steps on, every rule must have done something and every disturbance must have been met, in some part.
_STEPS_FOR_COVERAGE = 2000


class Loop:
    """An event loop in a thread of its own, for rules that hypothesis calls without one."""

    def __init__(self, hangs_s: float = 120.0) -> None:
        """Nothing that is run takes longer than `hangs_s` unless it hangs."""
        self._hangs_s = hangs_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.hang_report: Callable[[asyncio.AbstractEventLoop], str] = repr
        """Says where everything stands, should something not return."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self._hangs_s)
        except TimeoutError:
            if future.done():
                raise
            pytest.fail(f"it has not returned within {self._hangs_s:g} s\n{self.hang_report(self._loop)}")

    def close(self) -> None:
        """End the thread, and what it has not brought to its end."""
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
    """A host with one daemon, to which things happen."""

    loop: Loop

    # What comes of a kill is not drawn, and decides which rules there are to draw from. No two sequences may begin with
    # the same draws, or they are found to be inconsistent: evenly spread, unlike larger integers.
    @initialize(number=st.integers(0, (1 << 24) - 1))
    def begin(self, number: int) -> None:
        """A daemon with nothing in it."""
        # The first thing that hypothesis does is to draw the simplest of everything: the same rule again and again.
        assume(number)
        self._proxy = self.rig.engine_proxy()
        self.loop.run(self._proxy.__aenter__())
        self._host = self.loop.run(ModelledHost.open(self.rig, self._proxy))
        self.loop.hang_report = lambda loop: hang_report(loop, self.host.daemon, self.rig)

    def teardown(self) -> None:
        """Whatever it was, all of it can be deleted."""
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
def test_the_model_holds_in_a_short_sequence(rig: Rig) -> None:
    tally = _play_sequences(rig, "Short", _SHORT, _SHORT_SEQUENCE)
    assert tally["steps"]


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(_PARTS))
def test_the_model_holds(rig: Rig, request: pytest.FixtureRequest, part: int) -> None:
    steps = int(request.config.getoption("--steps"))
    tally = _play_sequences(rig, str(part), max(1, -(-steps // _PARTS // _SEQUENCE)), _SEQUENCE)
    if steps >= _STEPS_FOR_COVERAGE:
        occurrences = {name: tally[name] for name in (*DISTURBANCES, *(f"rule {name}" for name in COUNTED))}
        request.node.user_properties.append((REQUIRED, {"parts": _PARTS, "counts": occurrences}))


def _play_sequences(rig: Rig, name: str, sequences: int, steps: int) -> Counter[str]:
    """Play random sequences of so many steps each; how often each rule and each disturbance occurred in them.

    Raises what has failed first, with its steps in a note.
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
                    # Hypothesis cannot make these sequences shorter; see `sequence_shrinker`.
                    phases=[Phase.generate],
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    verbosity=Verbosity.normal,
                ),
            )
    except Exception:
        # Hypothesis plays a sequence that has failed once more, and then raises what comes of that.
        if not failures:
            raise
        first = failures[0]
        first.error.add_note(_failure_or_none(first, kind))
        raise first.error from None
    finally:
        loop.close()
        print(f"\nmet: {dict(sorted(tally.items()))}")  # noqa: T201 - shown where it fails, and with -s
    return tally


def _failure_or_none(failure: Failure, kind: type[HostStateMachine]) -> str:
    """The steps of a failure; and the shortest part of them with which it comes again, if it does."""
    steps = "\n".join(f"  {step}" for step in failure.steps)
    where = failure_location(failure.error)

    def fails(part: Sequence[Step]) -> bool:
        again = _replay(part, kind)
        return again is not None and failure_location(again.error) == where

    shrunk = shrink(failure.steps, fails, _SHRINK_SECONDS)
    return f"the sequence that failed has these steps:\n{steps}\n{shrunk}"


def _replay(steps: Sequence[Step], kind: type[HostStateMachine]) -> Failure | None:
    """Follow the rules of these steps once more, on a host of their own; what failed first. See `RuleBase.follow`."""
    host, earlier = kind(), len(kind.failures)
    # Whatever fails is among the host's failures.
    with contextlib.suppress(Exception):
        try:
            host.begin(number=1)
            for step in steps:
                host.follow(step)
        finally:
            host.teardown()
    return next(iter(kind.failures[earlier:]), None)


def test_what_hangs_is_shown(rig: Rig) -> None:
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
