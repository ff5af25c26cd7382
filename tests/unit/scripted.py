"""Operations whose steps a test writes itself, over a store that a test can make fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step
from gpudock_server.model.container import Container
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.store_changes import Claim, PutContainer, StoreChange
from gpudock_server.ports import ContainerView
from typing_extensions import override

from tests.rpc.fakes import LONG_AGO
from tests.rpc.memory_store import MemoryStore
from tests.unit.desk import Desk


class UnsteadyStore(MemoryStore):
    """A store whose next transactions fail with `failures` (None: one that does not), and `daemons` that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: deque[Exception | None] = deque()
        self.before: Callable[[Sequence[StoreChange]], None] = lambda _: None
        self.daemons: list[NodeRecord] = []

    @override
    async def apply(self, changes: Sequence[StoreChange]) -> int:
        self.before(changes)
        failure = self.failures.popleft() if self.failures else None
        if failure is not None:
            raise failure
        return await super().apply(changes)

    @override
    async def nodes(self) -> tuple[NodeRecord, ...]:
        return tuple(self.daemons)


def daemon(node: str, address: str) -> NodeRecord:
    """A daemon that is alive."""
    return NodeRecord(
        node=node,
        host="host1",
        address=address,
        version="1",
        engine_id="E",
        boot_id="b",
        pid=1,
        start_ticks=1,
        start_time=LONG_AGO,
    )


class Script(Saga[ContainerView]):
    """A saga of these steps; its commit makes `changes` besides, and the head one generation older."""

    def __init__(self, desk: Desk, steps: Sequence[Step], after: Sequence[Step] = ()) -> None:
        self.desk = desk
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
        return await self.desk.store.container(run.operation.target.name)

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        container = view.container.changed(generation=view.container.generation + 1)
        return Outcome([PutContainer(container, expect=view.version), *self.changes(container)], container)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        return [PutContainer(view.container, expect=view.version)]


class Held(Script):
    """One that nobody may cancel."""

    cancellable = False


async def draft_of(
    desk: Desk,
    saga: Callable[[Operation], Script],
    *,
    claims: Sequence[Claim] = (),
    kind: OperationKind = OperationKind.RESTART,
) -> OperationDraft:
    """A draft of an operation on container `a`."""
    view = await desk.store.container("a")
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


async def begun(desk: Desk, script: Script, *, claims: Sequence[Claim] = ()) -> str:
    """Begin it; its id."""
    return await desk.operations.begin(lambda: draft_of(desk, lambda _: script, claims=claims), None)


async def nothing(_: OperationRun) -> None:
    """A step that does nothing."""
