"""Operations with steps that a test defines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step
from gpudock_server.model.container import Container
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.store_changes import Claim, PutContainer, StoreChange
from gpudock_server.ports import ContainerView
from typing_extensions import override

from tests.unit.model_node import ModelNode


class ScriptedSaga(Saga[ContainerView]):
    """A saga of these steps; its commit makes `changes` besides, and the head one generation older."""

    def __init__(self, model: ModelNode, steps: Sequence[Step], after: Sequence[Step] = ()) -> None:
        self.model = model
        self._steps, self._after = tuple(steps), tuple(after)
        self.changes: Callable[[Container], Sequence[StoreChange]] = lambda _: ()

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return self._steps

    @property
    @override
    def cleanup_steps(self) -> tuple[Step, ...]:
        return self._after

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
    """One that nobody may cancel."""

    cancellable = False


async def draft_of(
    model: ModelNode,
    saga: Callable[[Operation], ScriptedSaga],
    *,
    claims: Sequence[Claim] = (),
    kind: OperationKind = OperationKind.RESTART,
) -> OperationDraft:
    """A draft of an operation on container `a`."""
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


async def begin_saga(model: ModelNode, script: ScriptedSaga, *, claims: Sequence[Claim] = ()) -> str:
    """Begin it; its id."""
    return await model.operations.begin(lambda: draft_of(model, lambda _: script, claims=claims), None)


async def nothing(_: OperationRun) -> None:
    """A step that does nothing."""
