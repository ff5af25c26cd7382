"""What all rules draw from: what there is, and what goes wrong meanwhile."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from hypothesis.stateful import RuleBasedStateMachine, invariant

from tests.rig import EngineProxy, Fault, Rig
from tests.stateful.model import ExpectedContainer, Spec, State
from tests.stateful.modelled_host import Act, Change, ModelledHost
from tests.stateful.sequence_shrinker import Draws, Failure, ReplayedDraws, Step, StepNotApplicableError

T = TypeVar("T")

RUNNING, PAUSED, EXITED, STOPPED, FAILED = State
RESTING = (RUNNING, STOPPED, EXITED)
# Of these troubles each must have been met, and so often; else the sequences were too tame to show anything.
DISTURBANCES = ("refuse", "drop", "drop after", "kill", "cancel")

KEEP = 6
CARDS = 8
GPUS = st.integers(0, 3)
NAMES = ("ada", "bob", "cleo")
VOLUMES = ("hall", "isle")
TARGETS = ("/data", "/more")

_CALLS = r"/(containers|images|volumes)(/(?!.*/wait$).*)?"
_MUTATIONS = "POST|DELETE"


# The names of all rules that count.
COUNTED: list[str] = []


def counted(rule: Callable[..., None]) -> Callable[..., None]:
    """Count how often a rule did something, and did not find that nothing fits what it drew (`skip`).

    What it drew is kept in the sequence's steps.
    """
    COUNTED.append(rule.__name__)

    @functools.wraps(rule)
    def counting(self: RuleBase, *words: object, **named: object) -> None:
        skipped = self.tally["skipped"]
        # One that another rule calls, with its own draws, is part of that one's step.
        if not words:
            arguments = {name: value for name, value in named.items() if name != "data"}
            step = Step(rule.__name__, arguments, draws="data" in named)
            self.steps.append(step)
            if isinstance(data := named.get("data"), st.DataObject):
                named["data"] = Draws(data, step)
        try:
            rule(self, *words, **named)
        except (HypothesisException, StepNotApplicableError):
            raise
        except Exception as error:
            self.failures.append(Failure(tuple(self.steps), error))
            raise
        self.tally[f"rule {rule.__name__}"] += self.tally["skipped"] == skipped

    return counting


class LoopRunner(Protocol):
    """An event loop elsewhere."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result."""


class RuleBase(RuleBasedStateMachine):
    """The base of all rules."""

    rig: Rig
    loop: LoopRunner
    tally: Counter[str]
    failures: list[Failure]

    def __init__(self) -> None:
        super().__init__()
        self._host: ModelledHost | None = None
        self._proxy: EngineProxy | None = None
        # Whether anything has been done since everything was looked at.
        self.changed_since_check = False
        self.steps: list[Step] = []

    @property
    def host(self) -> ModelledHost:
        """The one that was begun."""
        assert self._host is not None
        return self._host

    def follow(self, step: Step) -> None:
        """Do the same once more, if what was drawn can be had. Preconditions are of what is drawn: not of this."""
        draws = {"data": ReplayedDraws(step)} if step.draws else {}
        with contextlib.suppress(StepNotApplicableError):
            getattr(self, step.rule)(**step.arguments, **draws)

    @invariant()
    def count(self) -> None:
        """How many steps there were."""
        self.tally["steps"] += 1

    def has_container(self, *states: State) -> bool:
        """Whether there is one in any of these states (none: in any at all)."""
        known = self._host.known if self._host else {}
        return any(not states or container.state in states for container in known.values())

    @property
    def has_volumes(self) -> bool:
        """Whether there is any."""
        return bool(self._host and self._host.volumes)

    def choose_container(self, data: Draws, *states: State) -> ExpectedContainer:
        """A container in any of these states."""
        self.changed_since_check = True
        names = sorted(name for name, container in self.host.known.items() if not states or container.state in states)
        return self.host.known[data.choose(names, "which")]

    def free_name(self, data: Draws) -> str:
        """One that no container has."""
        return data.choose([name for name in NAMES if name not in self.host.known], "name")

    def choose_mounts(self, data: Draws) -> tuple[tuple[str, str], ...]:
        """Some of the volumes that there are, or none, at some of the targets."""
        choices = (None, *sorted(self.host.volumes))
        drawn = [(target, data.choose(choices, target)) for target in TARGETS]
        return tuple((target, volume) for target, volume in drawn if volume is not None)

    def can_claim(self, gpus: int, *, released: int = 0) -> bool:
        """Whether that many cards are free, once others are given back."""
        return gpus - released <= CARDS - sum(container.cards for container in self.host.known.values())

    def lacks_volume(self, spec: Spec) -> bool:
        """Whether it names one that was deleted."""
        return not spec.volumes <= self.host.volumes.keys()

    def skip(self) -> None:
        """Nothing is done in this step: what was drawn does not fit."""
        self.tally["skipped"] += 1

    def refused(self, act: Act, reason: str, *names: str, holders: Collection[str] = ()) -> None:
        """It must be, for that reason, and change nothing."""
        self.loop.run(self.host.refused(act, reason, holders))
        self.loop.run(self.host.check(*names))
        self.tally[f"refused: {reason}"] += 1

    def perform(
        self,
        data: Draws,
        name: str,
        act: Act,
        before: Any,
        after: Any,
        *,
        also: Mapping[str, ExpectedContainer] | None = None,
    ) -> None:
        """Make a change; half the time with an engine fault, a killed daemon or a cancelled operation."""
        change = Change(name, act, before, after, tuple((also or {}).values()))
        disturbance = data.choose(("none",) * len(DISTURBANCES) + DISTURBANCES, "disturbance")
        match disturbance:
            case "kill":
                met = self.loop.run(self.host.kill_during(change, self._delay(data, 600)))
            case "cancel":
                met = self.loop.run(self.host.cancel_during(change, self._delay(data, 300)))
            case _:
                fault = self._inject_fault(data, disturbance, 2 if change.is_of_volume else 5)
                self.loop.run(self.host.act(change))
                met = fault is None or fault.hit.is_set()
        self.tally[disturbance] += met
        self.changed_since_check = True
        self.loop.run(self.host.check_settled(name, *(also or {})))

    @staticmethod
    def _delay(data: Draws, most_ms: int) -> float:
        """In seconds; drawn, so that a failing example shows it."""
        return data.number(0, most_ms, "after ms") / 1000

    def _inject_fault(self, data: Draws, disturbance: str, most: int) -> Fault | None:
        """It hits one of the engine's next `most` deeds. A volume takes one or two of them."""
        faults = self.host.proxy.faults
        match disturbance:
            case "refuse":
                # Questions are refused too; there are many of them between two deeds.
                if data.flag("a change"):
                    return faults.fail(_MUTATIONS, _CALLS, nth=data.number(1, most, "nth"))
                return faults.fail(".*", _CALLS, nth=data.number(1, 15, "nth"))
            case "drop" | "drop after":
                nth = data.number(1, most, "nth")
                return faults.drop(_MUTATIONS, _CALLS, nth=nth, after=disturbance == "drop after")
        return None
