"""A saga is what an operation does: steps that can be repeated and undone, the commit, and cleanup steps after it.

A saga is built from the arguments in its operation's record alone, so that after a restart the daemon can build it
again and resume it. Its steps must therefore depend on nothing that the record does not have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from gpudock_server.core.operations.resource import Resource, V
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan, Result
from gpudock_server.model.record import JsonObject, Record
from gpudock_server.model.resource import ResourceRef
from gpudock_server.model.store_changes import Claim, PutContainer, PutVolume, StoreChange

R = TypeVar("R", bound=Record)

COMMIT_STAGE = "commit"


class OperationRun(Protocol):
    """The operation that a step belongs to, as the step uses it."""

    @property
    def operation(self) -> Operation:
        """The record of the operation, with the results of all earlier steps."""
        ...

    def progress(self, current_bytes: int, total_bytes: int) -> None:
        """Report the progress of this stage to watchers, in bytes."""
        ...

    def add_message(self, message: str) -> None:
        """Add a sentence to the operation's message; it is stored with the next write of the record."""
        ...

    def set_stage_message(self, message: str) -> None:
        """Set the message of this stage, which watchers see while it runs; empty removes it."""
        ...

    async def run_child(self, name: str, draft: Callable[[], Awaitable[OperationDraft]]) -> None:
        """Run a child operation to its end. `name` identifies it: a repeated call waits for the same child.

        The child has its own locks and record, and is not undone with its parent. Raises the errors of `draft`, and
        the error that the child ended with.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepResult(Generic[R]):
    """A reference to the result of a step in its operation's record: the step's name and the type of its result."""

    step: str
    type: type[R]

    def find(self, operation: Operation) -> R | None:
        """The result of the step; None before the step is done, and where it has no result."""
        facts = operation.facts(self.step)
        return self.type.model_validate(facts) if facts else None

    def of(self, operation: Operation) -> R:
        """The result of a step that is done. Raises pydantic.ValidationError where it has none."""
        return self.type.model_validate(operation.facts(self.step))


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded step of a saga.

    `do` may run again after a crash, and must accept what its first run has made. Its result (see StepResult) is
    recorded before the next step begins: later steps, `undo` and the next daemon read it there. `undo` runs for a step
    that was done, half done or perhaps never begun.
    """

    name: str
    do: Callable[[OperationRun], Awaitable[Record | None]]
    undo: Callable[[OperationRun], Awaitable[None]] | None = None
    # For a step that may take long while no container is down. A daemon that shuts down cancels it at once, and the
    # next daemon repeats it. A daemon that starts does not wait for its end.
    interruptible: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The changes of a saga's commit, and the result of its operation."""

    changes: Sequence[StoreChange]
    result: Result


class Saga(ABC, Generic[V]):
    """The steps of one operation. `cancellable`: whether a caller may cancel it before the commit."""

    cancellable: ClassVar[bool] = True

    def __init__(self, resource: Resource[V]) -> None:
        """`resource`: the kind of the operation's target."""
        self._resource = resource

    @property
    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """The steps before the commit; undone in reverse order when one fails."""

    @property
    def cleanup_steps(self) -> tuple[Step, ...]:
        """The steps after the commit; each is retried until it is done."""
        return ()

    async def read_target(self, run: OperationRun) -> V | None:
        """The current view of the target; None where it is gone or another resource has its name."""
        return await self._resource.view_of(run.operation.target)

    @abstractmethod
    async def success_changes(self, run: OperationRun, view: V) -> Outcome:
        """The changes of the commit, for `view`, the current target. Called again after a conflict."""

    @abstractmethod
    async def failure_changes(self, run: OperationRun, view: V) -> Sequence[StoreChange]:
        """The changes that leave nothing of an undone operation but its record."""


SagaBuilder: TypeAlias = Callable[[Operation], Saga[Any]]


@dataclass(frozen=True, slots=True)
class OperationDraft:
    """An operation that could begin, with all that its first transaction writes or compares."""

    kind: OperationKind
    target: ResourceRef
    target_record: PutContainer | PutVolume
    arguments: JsonObject
    plan: OperationPlan
    # The saga that this builds may have more than the record does (a registry's password), which is lost at a restart.
    build: SagaBuilder
    claims: Sequence[Claim] = ()
    # Further resources to lock, and further conditions of the first transaction.
    locks: Sequence[ResourceRef] = ()
    conditions: Sequence[StoreChange] = ()

    @property
    def creates_target(self) -> bool:
        """Whether the operation creates its target."""
        return self.target_record.expect == 0
