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
from tests.stateful.model import Expected, Spec, State
from tests.stateful.modelled_host import Act, Arena, Deed
from tests.stateful.sequence_shrinker import DrawnAgain, Draws, Failure, Step, UnfitError

T = TypeVar("T")

RUNNING, PAUSED, EXITED, STOPPED, FAILED = State
RESTING = (RUNNING, STOPPED, EXITED)
# Of these troubles each must have been met, and so often; else the sequences were too tame to show anything.
TROUBLES = ("refuse", "drop", "drop after", "kill", "cancel")

KEEP = 6
CARDS = 8
GPUS = st.integers(0, 3)
NAMES = ("ada", "bob", "cleo")
VOLUMES = ("hall", "isle")
TARGETS = ("/data", "/more")

_CALLS = r"/(containers|images|volumes)(/(?!.*/wait$).*)?"
_DEEDS = "POST|DELETE"


# The names of all rules that count.
COUNTED: list[str] = []


def counted(rule: Callable[..., None]) -> Callable[..., None]:
    """Count how often a rule did something, and did not find that nothing fits what it drew (`idle`).

    What it drew is kept in the sequence's steps.
    """
    COUNTED.append(rule.__name__)

    @functools.wraps(rule)
    def counting(self: Drawing, *words: object, **named: object) -> None:
        idle = self.tally["idle"]
        # One that another rule calls, with its own draws, is part of that one's step.
        if not words:
            arguments = {name: value for name, value in named.items() if name != "data"}
            step = Step(rule.__name__, arguments, draws="data" in named)
            self.steps.append(step)
            if isinstance(data := named.get("data"), st.DataObject):
                named["data"] = Draws(data, step)
        try:
            rule(self, *words, **named)
        except (HypothesisException, UnfitError):
            raise
        except Exception as error:
            self.failures.append(Failure(tuple(self.steps), error))
            raise
        self.tally[f"rule {rule.__name__}"] += self.tally["idle"] == idle

    return counting


class Runs(Protocol):
    """An event loop elsewhere."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result."""


class Drawing(RuleBasedStateMachine):
    """The base of all rules."""

    rig: Rig
    loop: Runs
    tally: Counter[str]
    failures: list[Failure]

    def __init__(self) -> None:
        super().__init__()
        self._arena: Arena | None = None
        self._proxy: EngineProxy | None = None
        # Whether anything has been done since everything was looked at.
        self.news = False
        self.steps: list[Step] = []

    @property
    def arena(self) -> Arena:
        """The one that was begun."""
        assert self._arena is not None
        return self._arena

    def follow(self, step: Step) -> None:
        """Do the same once more, if what was drawn can be had. Preconditions are of what is drawn: not of this."""
        draws = {"data": DrawnAgain(step)} if step.draws else {}
        with contextlib.suppress(UnfitError):
            getattr(self, step.rule)(**step.arguments, **draws)

    @invariant()
    def count(self) -> None:
        """How many steps there were."""
        self.tally["steps"] += 1

    def has(self, *states: State) -> bool:
        """Whether there is one in any of these states (none: in any at all)."""
        known = self._arena.known if self._arena else {}
        return any(not states or one.state in states for one in known.values())

    @property
    def has_volumes(self) -> bool:
        """Whether there is any."""
        return bool(self._arena and self._arena.volumes)

    def one(self, data: Draws, *states: State) -> Expected:
        """A container in any of these states."""
        self.news = True
        names = sorted(name for name, one in self.arena.known.items() if not states or one.state in states)
        return self.arena.known[data.choose(names, "which")]

    def free_name(self, data: Draws) -> str:
        """One that no container has."""
        return data.choose([name for name in NAMES if name not in self.arena.known], "name")

    def mounts(self, data: Draws) -> tuple[tuple[str, str], ...]:
        """Some of the volumes that there are, or none, at some of the targets."""
        choices = (None, *sorted(self.arena.volumes))
        drawn = [(target, data.choose(choices, target)) for target in TARGETS]
        return tuple((target, volume) for target, volume in drawn if volume is not None)

    def can_have(self, gpus: int, *, instead_of: int = 0) -> bool:
        """Whether that many cards are free, once others are given back."""
        return gpus - instead_of <= CARDS - sum(one.cards for one in self.arena.known.values())

    def lacks_volume(self, spec: Spec) -> bool:
        """Whether it names one that was deleted."""
        return not spec.volumes <= self.arena.volumes.keys()

    def idle(self) -> None:
        """Nothing is done in this step: what was drawn does not fit."""
        self.tally["idle"] += 1

    def refused(self, act: Act, reason: str, *names: str, holders: Collection[str] = ()) -> None:
        """It must be, for that reason, and change nothing."""
        self.loop.run(self.arena.refused(act, reason, holders))
        self.loop.run(self.arena.check(*names))
        self.tally[f"refused: {reason}"] += 1

    def do(
        self,
        data: Draws,
        name: str,
        act: Act,
        before: Any,
        after: Any,
        *,
        also: Mapping[str, Expected] | None = None,
    ) -> None:
        """Undisturbed half the time; else the engine is harmed meanwhile, the daemon killed, or it is cancelled."""
        deed = Deed(name, act, before, after, tuple((also or {}).values()))
        trouble = data.choose(("none",) * len(TROUBLES) + TROUBLES, "trouble")
        match trouble:
            case "kill":
                met = self.loop.run(self.arena.kill_during(deed, self._moment(data, 600)))
            case "cancel":
                met = self.loop.run(self.arena.cancel_during(deed, self._moment(data, 300)))
            case _:
                fault = self._plant(data, trouble, 2 if deed.of_a_volume else 5)
                self.loop.run(self.arena.act(deed))
                met = fault is None or fault.hit.is_set()
        self.tally[trouble] += met
        self.news = True
        self.loop.run(self.arena.check_settled(name, *(also or {})))

    @staticmethod
    def _moment(data: Draws, most_ms: int) -> float:
        """In seconds; drawn, so that a failing example shows it."""
        return data.number(0, most_ms, "after ms") / 1000

    def _plant(self, data: Draws, trouble: str, most: int) -> Fault | None:
        """It hits one of the engine's next `most` deeds. A volume takes one or two of them."""
        faults = self.arena.proxy.faults
        match trouble:
            case "refuse":
                # Questions are refused too; there are many of them between two deeds.
                if data.flag("a deed"):
                    return faults.fail(_DEEDS, _CALLS, nth=data.number(1, most, "nth"))
                return faults.fail(".*", _CALLS, nth=data.number(1, 15, "nth"))
            case "drop" | "drop after":
                nth = data.number(1, most, "nth")
                return faults.drop(_DEEDS, _CALLS, nth=nth, after=trouble == "drop after")
        return None
