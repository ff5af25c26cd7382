"""The base of all rules: how they draw containers and volumes, and the disturbance of a change."""

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
# Each disturbance must have occurred in a long run; otherwise the sequences have not tested it.
DISTURBANCES = ("refuse", "drop", "drop after", "kill", "cancel")

KEEP = 6
GPU_COUNT = 8
GPUS = st.integers(0, 3)
NAMES = ("ada", "bob", "cleo")
VOLUMES = ("hall", "isle")
TARGETS = ("/data", "/more")

_CALLS = r"/(containers|images|volumes)(/(?!.*/wait$).*)?"
_MUTATIONS = "POST|DELETE"


# The names of all rules that count.
COUNTED: list[str] = []


def counted(rule: Callable[..., None]) -> Callable[..., None]:
    """Count how often a rule did something, and did not call `skip`. Its draws are recorded as a step."""
    COUNTED.append(rule.__name__)

    @functools.wraps(rule)
    def counting(self: RuleBase, *words: object, **named: object) -> None:
        skipped = self.tally["skipped"]
        # A rule that another rule calls, with positional arguments, belongs to the step of that rule.
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
    """An event loop in another thread."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine; returns its result."""


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
        # Whether anything was changed since the last check of everything.
        self.changed_since_check = False
        self.steps: list[Step] = []

    @property
    def host(self) -> ModelledHost:
        """The host of this sequence."""
        assert self._host is not None
        return self._host

    def follow(self, step: Step) -> None:
        """Replay a step, without its preconditions; does nothing if its draws are not possible here."""
        draws = {"data": ReplayedDraws(step)} if step.draws else {}
        with contextlib.suppress(StepNotApplicableError):
            getattr(self, step.rule)(**step.arguments, **draws)

    @invariant()
    def count(self) -> None:
        """Count the steps."""
        self.tally["steps"] += 1

    def has_container(self, *states: State) -> bool:
        """Whether there is a container in one of these states; without states, any container."""
        known = self._host.containers if self._host else {}
        return any(not states or container.state in states for container in known.values())

    @property
    def has_volumes(self) -> bool:
        """Whether there is a volume."""
        return bool(self._host and self._host.volumes)

    def choose_container(self, data: Draws, *states: State) -> ExpectedContainer:
        """Draw a container in one of these states; without states, any container."""
        self.changed_since_check = True
        names = sorted(
            name for name, container in self.host.containers.items() if not states or container.state in states
        )
        return self.host.containers[data.choose(names, "which")]

    def free_name(self, data: Draws) -> str:
        """Draw a name that no container has."""
        return data.choose([name for name in NAMES if name not in self.host.containers], "name")

    def choose_mounts(self, data: Draws) -> tuple[tuple[str, str], ...]:
        """Draw mounts: an existing volume or none for each target."""
        choices = (None, *sorted(self.host.volumes))
        drawn = [(target, data.choose(choices, target)) for target in TARGETS]
        return tuple((target, volume) for target, volume in drawn if volume is not None)

    def can_claim(self, gpus: int, *, released: int = 0) -> bool:
        """Whether `gpus` GPUs are free once `released` GPUs are released."""
        return gpus - released <= GPU_COUNT - sum(container.gpus for container in self.host.containers.values())

    def lacks_volume(self, spec: Spec) -> bool:
        """Whether a spec mounts a volume that was deleted."""
        return not spec.volumes <= self.host.volumes.keys()

    def skip(self) -> None:
        """End a step without a change, because its draws do not fit the host."""
        self.tally["skipped"] += 1

    def refused(self, act: Act, reason: str, *names: str, holders: Collection[str] = ()) -> None:
        """Make a request that must fail with `reason` and change nothing."""
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
        """Draw a delay; returns seconds. It is drawn so that a failing example shows it."""
        return data.number(0, most_ms, "after ms") / 1000

    def _inject_fault(self, data: Draws, disturbance: str, most: int) -> Fault | None:
        """Inject a fault into one of the next `most` changing engine calls; a volume needs one or two of them."""
        faults = self.host.proxy.faults
        match disturbance:
            case "refuse":
                # Also refuse reads, of which there are many between two changing calls.
                if data.flag("a change"):
                    return faults.fail(_MUTATIONS, _CALLS, nth=data.number(1, most, "nth"))
                return faults.fail(".*", _CALLS, nth=data.number(1, 15, "nth"))
            case "drop" | "drop after":
                nth = data.number(1, most, "nth")
                return faults.drop(_MUTATIONS, _CALLS, nth=nth, after=disturbance == "drop after")
        return None
