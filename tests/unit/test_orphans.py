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


def one(
    *, engine_id: str = "new", uid: str = UID, name: str = NAME, operation: str = OPERATION, revision: str = "2",
    spec: str | None = "",
) -> EngineContainer:  # fmt: skip
    """An engine container of ours; `spec` None: without that label, and a text: unreadable."""
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


def head(*, uid: str = UID, revision: int = 1, binds: str = "old", locked_by: str = "") -> ContainerView:
    """The record of `web`."""
    binding = EngineBinding(
        engine_id=binds, engine_name="gpudock-web-old", image_id="i", placement=Placement(), fixed_digest=""
    )
    container = Container(
        name=NAME, uid=uid, node=NODE, owner="", generation=1, revision=revision, spec=SPEC,
        status=ContainerStatus(state=ContainerState.RUNNING), engine=binding if binds else None,
        create_time=now(), update_time=now(),
    )  # fmt: skip
    return ContainerView(container, 1, locked_by)


def ended(state: OperationState, kind: OperationKind = OperationKind.SCALE, operation_id: str = OPERATION) -> Operation:
    """An operation on `web` that has ended."""
    return Operation(
        id=operation_id, kind=kind, target=head().container.target, node=NODE, state=state, create_time=now(),
        update_time=now(),
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the table: the situation, and the action for the engine container `new`."""

    action: OrphanAction
    reason: str
    unbound: tuple[EngineContainer, ...] = (one(),)
    view: ContainerView | None = None
    old_stands: bool = False
    operation: Operation | None = None
    deleted: bool = False
    at_work: bool = False
    unreadable: bool = False


SUCCEEDED, FAILED = OperationState.SUCCEEDED, OperationState.FAILED
ANOTHER = one(engine_id="another", operation="op-87654321")

ROWS = (
    Row(OrphanAction.LEFT, "in progress", at_work=True),
    Row(OrphanAction.LEFT, "in progress", view=head(locked_by="op")),
    Row(OrphanAction.REPORTED, "is unreadable", unreadable=True),
    Row(OrphanAction.REMOVED, "was deleted", deleted=True),
    # Its record is gone.
    Row(OrphanAction.LOST, "record lost"),
    Row(OrphanAction.LOST, "record lost", operation=ended(SUCCEEDED)),
    Row(OrphanAction.REMOVED, "undone", operation=ended(FAILED)),
    Row(OrphanAction.REMOVED, "undone", operation=ended(OperationState.CANCELLED)),
    Row(OrphanAction.REMOVED, "no spec label", (one(spec=None),)),
    Row(OrphanAction.REPORTED, "cannot read the labels", (one(spec="{}"),)),
    Row(OrphanAction.REPORTED, "cannot read the labels", (one(revision="x"),)),
    Row(OrphanAction.REPORTED, "cannot read the labels", (one(name="No Name"),)),
    Row(OrphanAction.REPORTED, "several candidates", (one(), ANOTHER)),
    Row(
        OrphanAction.REPORTED,
        "several candidates",
        (one(), replace(ANOTHER, labels=ANOTHER.labels | {"gpudock.uid": "u2"})),
    ),
    Row(OrphanAction.REPORTED, "several candidates", (one(), ANOTHER), operation=ended(FAILED)),
    # Another has its name.
    Row(OrphanAction.REPORTED, "the name web is taken", view=head(uid="u2")),
    Row(OrphanAction.REMOVED, "undone", view=head(uid="u2"), operation=ended(FAILED)),
    Row(OrphanAction.REMOVED, "no spec label", (one(spec=None),), view=head(uid="u2")),
    # Its record binds another: a predecessor, or what was left of an undone operation.
    Row(OrphanAction.REMOVED, "at revision 2", view=head(revision=2), old_stands=True),
    Row(OrphanAction.REMOVED, "at revision 3", view=head(revision=3), old_stands=True),
    Row(OrphanAction.REPORTED, "the engine container of its record is gone", view=head(revision=3)),
    Row(OrphanAction.REMOVED, "undone", view=head(), old_stands=True, operation=ended(FAILED)),
    Row(
        OrphanAction.REPORTED,
        "undone, and the engine container of its record is gone",
        view=head(),
        operation=ended(FAILED),
    ),
    Row(OrphanAction.REMOVED, "no spec label", (one(spec=None),), view=head(), old_stands=True),
    Row(OrphanAction.REPORTED, "of its record is gone", (one(spec=None),), view=head()),
    # It is newer than its record.
    Row(OrphanAction.NEWER, "newer", view=head()),
    Row(OrphanAction.NEWER, "newer", view=head(), operation=ended(SUCCEEDED)),
    Row(OrphanAction.NEWER, "newer", (one(revision="1"),), view=head(binds="", revision=0)),
    Row(OrphanAction.REPORTED, "still exists", view=head(), old_stands=True),
    Row(OrphanAction.REPORTED, "several candidates", (one(), ANOTHER), view=head()),
    Row(OrphanAction.REPORTED, "cannot read the labels", (one(spec="{}"),), view=head()),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.action.value}: {row.reason}")
def test_the_table(row: Row) -> None:
    views = {NAME: row.view} if row.view else {}
    unreadable = (UnreadableKey(key="/k", name=NAME, detail="d"),) if row.unreadable else ()
    operations = {row.operation.id: row.operation} if row.operation else {}
    evidence = OrphanClassifier(
        records=ContainerRecords(views, unreadable),
        history=OperationHistory(operations, frozenset({UID} if row.deleted else ())),
        unfinished={OPERATION} if row.at_work else set(),
        existing={"new", *({"old"} if row.old_stands else ())},
    )
    orphan = next(found for found in evidence.classify(row.unbound) if found.engine_container.id == "new")
    assert (orphan.action, row.reason in orphan.reason) == (row.action, True), orphan.reason
