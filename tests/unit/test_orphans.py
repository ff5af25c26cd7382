"""What reconcile does with an orphan: every row of the table in docs/reconcile.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from gpudock_server.core.containers.operation_history import OperationHistory
from gpudock_server.core.reconcile.orphans import OrphanAction, OrphanClassifier
from gpudock_server.core.reconcile.records import ContainerRecords
from gpudock_server.model.container import Container, ContainerState, ContainerStatus, EngineBinding, Placement
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import Operation, OperationKind, OperationState
from gpudock_server.model.record import now
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.ports import ContainerView, UnreadableKey

UID, NAME, NODE, OPERATION = "u1", "web", "n1", "op-12345678"
SPEC = ContainerSpec(image="busybox")


def orphan(
    *, engine_id: str = "new", uid: str = UID, name: str = NAME, operation: str = OPERATION, revision: str = "2",
    spec: str | None = "",
) -> EngineContainer:  # fmt: skip
    """Return an engine container of gpudock. `spec` None: without that label; a text: an unreadable label."""
    labels = {
        "gpudock.uid": uid,
        "gpudock.name": name,
        "gpudock.node": NODE,
        "gpudock.revision": revision,
        "gpudock.operation": operation,
    }
    if spec is not None:
        labels["gpudock.spec"] = spec or SPEC.model_dump_json()
    return EngineContainer(
        id=engine_id, name=f"gpudock-{name}-{operation[-8:]}", image_id="i", state=EngineState.RUNNING, pid=1,
        exit_code=0, oom_killed=False, error="", labels=labels, gpu_uuids=(), spec=SPEC if spec == "" else None,
    )  # fmt: skip


def record(*, uid: str = UID, revision: int = 1, engine_id: str = "old", locked_by: str = "") -> ContainerView:
    """Return the record of container `web`."""
    binding = EngineBinding(
        engine_id=engine_id, engine_name="gpudock-web-old", image_id="i", placement=Placement(), fixed_digest=""
    )
    container = Container(
        name=NAME, uid=uid, node=NODE, owner="", generation=1, revision=revision, spec=SPEC,
        status=ContainerStatus(state=ContainerState.RUNNING), engine=binding if engine_id else None,
        create_time=now(), update_time=now(),
    )  # fmt: skip
    return ContainerView(container, 1, locked_by)


def ended_operation(
    state: OperationState, kind: OperationKind = OperationKind.SCALE, operation_id: str = OPERATION
) -> Operation:
    """Return an operation on container `web` that has ended."""
    return Operation(
        id=operation_id, kind=kind, target=record().container.target, node=NODE, state=state, create_time=now(),
        update_time=now(),
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A situation, and the expected action for the engine container `new`."""

    action: OrphanAction
    reason: str
    unbound: tuple[EngineContainer, ...] = (orphan(),)
    view: ContainerView | None = None
    old_exists: bool = False
    operation: Operation | None = None
    deleted: bool = False
    in_progress: bool = False
    unreadable: bool = False


SUCCEEDED, FAILED = OperationState.SUCCEEDED, OperationState.FAILED
ANOTHER = orphan(engine_id="another", operation="op-87654321")

ROWS = (
    Row(OrphanAction.LEFT, "in progress", in_progress=True),
    Row(OrphanAction.LEFT, "in progress", view=record(locked_by="op")),
    Row(OrphanAction.REPORTED, "is unreadable", unreadable=True),
    Row(OrphanAction.REMOVED, "was deleted", deleted=True),
    # The record is gone.
    Row(OrphanAction.LOST, "record lost"),
    Row(OrphanAction.LOST, "record lost", operation=ended_operation(SUCCEEDED)),
    Row(OrphanAction.REMOVED, "undone", operation=ended_operation(FAILED)),
    Row(OrphanAction.REMOVED, "undone", operation=ended_operation(OperationState.CANCELLED)),
    Row(OrphanAction.REMOVED, "no spec label", (orphan(spec=None),)),
    Row(OrphanAction.REPORTED, "cannot read the labels", (orphan(spec="{}"),)),
    Row(OrphanAction.REPORTED, "cannot read the labels", (orphan(revision="x"),)),
    Row(OrphanAction.REPORTED, "cannot read the labels", (orphan(name="No Name"),)),
    Row(OrphanAction.REPORTED, "several candidates", (orphan(), ANOTHER)),
    Row(
        OrphanAction.REPORTED,
        "several candidates",
        (orphan(), replace(ANOTHER, labels=ANOTHER.labels | {"gpudock.uid": "u2"})),
    ),
    Row(OrphanAction.REPORTED, "several candidates", (orphan(), ANOTHER), operation=ended_operation(FAILED)),
    # Another container has the name.
    Row(OrphanAction.REPORTED, "the name web is taken", view=record(uid="u2")),
    Row(OrphanAction.REMOVED, "undone", view=record(uid="u2"), operation=ended_operation(FAILED)),
    Row(OrphanAction.REMOVED, "no spec label", (orphan(spec=None),), view=record(uid="u2")),
    # The record binds another engine container: this one is a predecessor, or left by an undone operation.
    Row(OrphanAction.REMOVED, "at revision 2", view=record(revision=2), old_exists=True),
    Row(OrphanAction.REMOVED, "at revision 3", view=record(revision=3), old_exists=True),
    Row(OrphanAction.REPORTED, "the engine container of its record is gone", view=record(revision=3)),
    Row(OrphanAction.REMOVED, "undone", view=record(), old_exists=True, operation=ended_operation(FAILED)),
    Row(
        OrphanAction.REPORTED,
        "undone, and the engine container of its record is gone",
        view=record(),
        operation=ended_operation(FAILED),
    ),
    Row(OrphanAction.REMOVED, "no spec label", (orphan(spec=None),), view=record(), old_exists=True),
    Row(OrphanAction.REPORTED, "of its record is gone", (orphan(spec=None),), view=record()),
    # The engine container is newer than the record.
    Row(OrphanAction.NEWER, "newer", view=record()),
    Row(OrphanAction.NEWER, "newer", view=record(), operation=ended_operation(SUCCEEDED)),
    Row(OrphanAction.NEWER, "newer", (orphan(revision="1"),), view=record(engine_id="", revision=0)),
    Row(OrphanAction.REPORTED, "still exists", view=record(), old_exists=True),
    Row(OrphanAction.REPORTED, "several candidates", (orphan(), ANOTHER), view=record()),
    Row(OrphanAction.REPORTED, "cannot read the labels", (orphan(spec="{}"),), view=record()),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.action.value}: {row.reason}")
def test_the_action_for_an_orphan(row: Row) -> None:
    views = {NAME: row.view} if row.view else {}
    unreadable = (UnreadableKey(key="/k", name=NAME, detail="d"),) if row.unreadable else ()
    operations = {row.operation.id: row.operation} if row.operation else {}
    evidence = OrphanClassifier(
        records=ContainerRecords(views, unreadable),
        history=OperationHistory(operations, frozenset({UID} if row.deleted else ())),
        unfinished={OPERATION} if row.in_progress else set(),
        existing={"new", *({"old"} if row.old_exists else ())},
    )
    classified = next(found for found in evidence.classify(row.unbound) if found.engine_container.id == "new")
    assert (classified.action, row.reason in classified.reason) == (row.action, True), classified.reason
