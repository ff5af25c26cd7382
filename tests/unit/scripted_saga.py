"""Operations with steps that a test defines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step
from gpudock_server.errors import EngineRejected
from gpudock_server.model.container import Container
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.store_changes import Claim, PutContainer, StoreChange
from gpudock_server.ports import ContainerView
from typing_extensions import override

from tests.unit.model_node import ModelNode

REFUSED = EngineRejected(call="work", status=500, detail="no")


class ScriptedSaga(Saga[ContainerView]):
    """A saga of these steps, whose commit writes `changes` and raises the generation of its container."""

    def __init__(self, model: ModelNode, steps: Sequence[Step], cleanup_steps: Sequence[Step] = ()) -> None:
        self.model = model
        self._steps, self._cleanup_steps = tuple(steps), tuple(cleanup_steps)
        self.changes: Callable[[Container], Sequence[StoreChange]] = lambda _: ()

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return self._steps

    @property
    @override
    def cleanup_steps(self) -> tuple[Step, ...]:
        return self._cleanup_steps

    @override
    async def read_target(self, run: OperationRun) -> ContainerView | None:
        return await self.model.store.container(run.operation.target.name)

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        container = view.container.changed(generation=view.container.generation + 1)
        return Outcome([PutContainer(container, expect=view.version), *self.changes(container)], container)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        return [PutContainer(view.container, expect=view.version)]


class UncancellableSaga(ScriptedSaga):
    """A saga that cannot be cancelled."""

    cancellable = False


async def draft_of(
    model: ModelNode,
    saga: Callable[[Operation], ScriptedSaga],
    *,
    claims: Sequence[Claim] = (),
    kind: OperationKind = OperationKind.RESTART,
) -> OperationDraft:
    """Return a draft of an operation on container `a`."""
    view = await model.store.container("a")
    assert view is not None
    return OperationDraft(
        kind=kind,
        target=view.container.target,
        target_record=PutContainer(view.container, expect=view.version),
        arguments={},
        plan=OperationPlan(),
        build=saga,
        claims=claims,
    )


async def begin_saga(model: ModelNode, saga: ScriptedSaga, *, claims: Sequence[Claim] = ()) -> str:
    """Begin an operation on container `a`; return its id."""
    return await model.operations.begin(lambda: draft_of(model, lambda _: saga, claims=claims), None)


async def do_nothing(_: OperationRun) -> None:
    """Do nothing, as a step."""


def failing(*errors: Exception) -> tuple[Callable[[OperationRun], Awaitable[None]], list[Exception]]:
    """Return a step that raises these errors one after the other, and the list of errors that it has not raised yet."""
    left = list(errors)

    async def work(_: OperationRun) -> None:
        if left:
            raise left.pop(0)

    return work, left
