"""What an operation does: steps that can be repeated and undone, a point of no return, and what comes after it.

A saga is built from the arguments in its operation's record alone, so that a daemon that starts can build it again and
go on where the one before it died. Its steps must therefore depend on nothing that the record does not hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from gpudock_server.model.operation import Operation, OperationKind, OperationPlan, Result
from gpudock_server.model.record import JsonObject, Record
from gpudock_server.model.resource import ResourceRef
from gpudock_server.model.store_changes import Claim, PutContainer, PutVolume, StoreChange

# A head with the version to compare and set against: what the store shows of the operation's target.
V = TypeVar("V")
R = TypeVar("R", bound=Record)

COMMIT_STAGE = "commit"


class OperationRun(Protocol):
    """What a step sees of the operation it is part of."""

    @property
    def operation(self) -> Operation:
        """The record, with the result of every step before this one."""
        ...

    def progress(self, current_bytes: int, total_bytes: int) -> None:
        """Tell watchers how far this stage is."""
        ...

    def add_message(self, message: str) -> None:
        """Add a sentence to the operation's message; kept with its next record."""
        ...

    def set_stage_message(self, message: str) -> None:
        """Show a sentence while this stage is at work, in place of the one before; empty takes it away."""
        ...

    async def run_child(self, name: str, draft: Callable[[], Awaitable[OperationDraft]]) -> None:
        """Bring another operation to its end, begun once however often this is repeated: the part of this `name`.

        It is an operation like any other, with its own locks and record, and stays done when this one is undone.
        Raises what `draft` raises, and what it ended with.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepResult(Generic[R]):
    """Where a step's result is found in the record of its operation: the step's name, and the type of its result."""

    step: str
    type: type[R]

    def find(self, operation: Operation) -> R | None:
        """None before the step is done, and where it had no result."""
        facts = operation.facts(self.step)
        return self.type.model_validate(facts) if facts else None

    def of(self, operation: Operation) -> R:
        """The result of a step that is done. Raises pydantic.ValidationError where there is none."""
        return self.type.model_validate(operation.facts(self.step))


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded step.

    `do` may run again after a crash, and what it made the first time is success. What it returns, for a later step, its
    own undo or a later daemon (see StepResult), is recorded before the next step begins. `undo` runs for a step that
    was done, half done or perhaps never begun.
    """

    name: str
    do: Callable[[OperationRun], Awaitable[Record | None]]
    undo: Callable[[OperationRun], Awaitable[None]] | None = None
    # The step may take long, and no container is down meanwhile. A daemon that shuts down cancels it at once, and the
    # next daemon repeats it. A daemon that starts does not wait for its end.
    interruptible: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transaction of a saga changes, and what its caller is then shown."""

    changes: Sequence[StoreChange]
    result: Result


class Saga(ABC, Generic[V]):
    """The script of one operation. `cancellable`: whether a caller may take it back before the point of no return."""

    cancellable: ClassVar[bool] = True

    @property
    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """What happens before the point of no return; undone in reverse when anything fails."""

    @property
    def cleanup_steps(self) -> tuple[Step, ...]:
        """What happens past the point of no return; driven forward until it is done."""
        return ()

    @abstractmethod
    async def read_target(self, run: OperationRun) -> V | None:
        """The target as of now; None when it is gone, or another has its name."""

    @abstractmethod
    async def success_changes(self, run: OperationRun, view: V) -> Outcome:
        """The changes that make the work true; `view` is the target as of now, and may be asked for again."""

    @abstractmethod
    async def failure_changes(self, run: OperationRun, view: V) -> Sequence[StoreChange]:
        """The changes that leave no trace of an undone operation, but its own record."""


SagaBuilder: TypeAlias = Callable[[Operation], Saga[Any]]


@dataclass(frozen=True, slots=True)
class OperationDraft:
    """An operation that could begin: what its first transaction changes beside the operation itself."""

    kind: OperationKind
    target: ResourceRef
    target_record: PutContainer | PutVolume
    arguments: JsonObject
    plan: OperationPlan
    # May know what is not recorded (a registry's password) and what a later process goes without.
    build: SagaBuilder
    claims: Sequence[Claim] = ()
    # What else must not change while it is at work, and what else must hold when it begins.
    locks: Sequence[ResourceRef] = ()
    conditions: Sequence[StoreChange] = ()

    @property
    def creates_target(self) -> bool:
        """Whether its target does not exist yet."""
        return self.target_record.expect == 0
