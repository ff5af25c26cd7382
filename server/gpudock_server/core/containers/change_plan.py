"""Decides how a container is changed, and records the decision as a ChangePlan. No input or output.

Start, restart, scale, update and rollback each give a `DesiredState`. `choose_method` decides the method,
`change_draft` looks up the rest, `change_saga` carries the plan out, and `validate_only` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from pydantic import model_validator

from gpudock_server.core.containers.snapshots import SnapshotArguments
from gpudock_server.model.claims import ClaimKey, claim_keys
from gpudock_server.model.container import (
    ACTIVE_STATES,
    Container,
    ContainerState,
    EngineBinding,
    Placement,
    RevisionCause,
)
from gpudock_server.model.engine import RegistryAuth
from gpudock_server.model.operation import LayerTransferMethod, OperationKind, OperationPlan
from gpudock_server.model.record import JsonObject, Record
from gpudock_server.model.snapshot import Snapshot, SnapshotKind
from gpudock_server.model.spec import ContainerSpec, SnapshotPolicy
from gpudock_server.ports import LayerTransferPlan

# The limits that the engine changes without a new process.
_LIMITS = ("cpus", "memory_bytes", "pids_limit", "restart_policy")
# What the arguments of an older version had in the place of `method`, `old_state`, `runs` and `allowed_exits`.
_FLAGS = ("replace", "stop", "start", "limits", "was_running", "frozen", "must_live", "may_end", "verify")
_T = TypeVar("_T")


class ChangeMethod(StrEnum):
    """How a container is changed.

    IN_PLACE: its process, if it has one, continues. RESTART: its engine container is stopped, if it runs, and started.
    REPLACE: a new engine container, the successor, takes the place of the old one.
    """

    IN_PLACE = "IN_PLACE"
    RESTART = "RESTART"
    REPLACE = "REPLACE"


class SuccessorFiles(StrEnum):
    """A successor's files: of the old engine container, a revision or the image; GRAFT: the old on another image."""

    CARRY = "CARRY"
    RESTORE = "RESTORE"
    FRESH = "FRESH"
    GRAFT = "GRAFT"


class AllowedExits(StrEnum):
    """The exit codes with which a process may exit while its start is watched; any other fails the change."""

    NONE = "NONE"
    ZERO = "ZERO"
    ANY = "ANY"


class SuccessorSource(Record):
    """Where a successor and its files come from.

    `image_id`: the image that the successor is created from, or grafted on. Empty: the image of the old engine
    container; for FRESH and GRAFT, the image that is pulled first (`present_id` is the image that has the name before).
    `revision`: the revision whose files are restored from `snapshot`. `fetch`: the engine no longer has `image_id`, the
    image of that revision, which is pulled first.
    """

    files: SuccessorFiles = SuccessorFiles.CARRY
    image_id: str = ""
    present_id: str = ""
    pull_stall_seconds: float | None = None
    base_image_id: str = ""
    revision: int = 0
    snapshot: Snapshot | None = None
    fetch: bool = False
    bytes_to_move: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def pulls(self) -> bool:
        """Whether the image that the user named is pulled first."""
        return self.files in (SuccessorFiles.FRESH, SuccessorFiles.GRAFT) and not self.image_id

    @property
    def restores_tree(self) -> bool:
        """Whether files are copied from a snapshot; a snapshot that is an image already has them."""
        return self.snapshot is not None and self.snapshot.kind is SnapshotKind.TREE


@dataclass(frozen=True, slots=True)
class DesiredState:
    """The state of a container after the change.

    `recreate`: always use a new engine container. `live`: keep the process, or fail. `chooses_gpus`: the request names
    the GPUs, so an unhealthy GPU is replaced even if the request is the same as before.
    """

    kind: OperationKind
    spec: ContainerSpec
    runs: bool
    restart: bool = False
    recreate: bool = False
    live: bool = False
    chooses_gpus: bool = False
    stop_timeout: float | None = None
    snapshots: SnapshotPolicy | None = None
    source: SuccessorSource = field(default_factory=SuccessorSource)
    registry_auth: RegistryAuth | None = None

    def starts(self, container: Container) -> bool:
        """Whether a process is started even if the engine container stays the same."""
        return self.runs and (self.restart or container.status.state not in ACTIVE_STATES)

    def keeps_process(self, container: Container, engine: EngineBinding) -> bool:
        """Whether the container runs and nothing in the request needs a new process.

        The container then keeps its GPUs, even unhealthy ones: replacing a GPU restarts the process, which is only done
        if the request names the GPUs or restarts the process anyway.
        """
        before, after = container.spec, self.spec
        return (
            self.runs
            and not self.starts(container)
            and not (self.recreate or self.chooses_gpus)
            and self.source.files is SuccessorFiles.CARRY
            and (before.gpus, before.ports) == (after.gpus, after.ports)
            and engine.fixed_digest == after.fixed_digest
        )


def choose_method(
    container: Container,
    engine: EngineBinding,
    desired: DesiredState,
    placement: Placement,
    *,
    unbound_host_paths: bool,
) -> ChangeMethod:
    """The strategy: keep the process if possible, else the engine container, else replace the engine container.

    `placement`: the GPUs and ports after the change. `unbound_host_paths`: the engine container is of an older version,
    and the engine itself would resolve its host paths at a start.
    """
    if desired.keeps_process(container, engine):
        return ChangeMethod.IN_PLACE
    if desired.recreate or desired.source.files is not SuccessorFiles.CARRY:
        return ChangeMethod.REPLACE
    if not desired.runs:
        # A stopped container gets its GPUs and ports at its next start, which replaces it if they differ.
        same = engine.fixed_digest == desired.spec.fixed_digest
        return ChangeMethod.IN_PLACE if same else ChangeMethod.REPLACE
    if not engine.matches(desired.spec, placement):
        return ChangeMethod.REPLACE
    if not desired.starts(container):
        return ChangeMethod.IN_PLACE
    return ChangeMethod.REPLACE if unbound_host_paths else ChangeMethod.RESTART


class ChangePlan(Record):
    """All that a change of a container does. The operation records it, and its saga is rebuilt from it.

    `old`, `old_state`, `old_spec`, `old_placement`: the container when the operation began. `spec`, `placement`,
    `revision`: the container after it. `cause` None: no new revision. `runs`: a process runs after the change.
    `allowed_exits`: with which exits the started process does not fail the change; None: no process is watched.
    `source`, `transfer`: where a successor and its files come from, and how the old writable layer gets there. `keep`:
    how the files of the old revision are kept. `prunes`: old revisions are pruned. `stop_timeout`: seconds; None: that
    of the spec. `authenticated`: a pull has credentials, which are not recorded.
    """

    method: ChangeMethod
    old: EngineBinding
    old_state: ContainerState
    old_spec: ContainerSpec
    old_placement: Placement
    spec: ContainerSpec
    placement: Placement
    revision: int
    cause: RevisionCause | None = None
    runs: bool
    allowed_exits: AllowedExits | None = None
    source: SuccessorSource = SuccessorSource()
    transfer: LayerTransferPlan = LayerTransferPlan(method=LayerTransferMethod.NONE)
    keep: SnapshotArguments = SnapshotArguments()
    prunes: bool = False
    stop_timeout: float | None = None
    owner: str = ""
    authenticated: bool = False

    @model_validator(mode="before")
    @classmethod
    def _read_old_record(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        return _with_method(data) if "replace" in data else data

    @property
    def stops_process(self) -> bool:
        """Whether the process of the old engine container is stopped."""
        return self.old_state in ACTIVE_STATES and self.method is not ChangeMethod.IN_PLACE

    @property
    def starts_process(self) -> bool:
        """Whether a process is started, by the old engine container or by the successor."""
        return self.runs and self.method is not ChangeMethod.IN_PLACE

    @property
    def changes_limits(self) -> bool:
        """Whether the limits of the engine container change in place."""
        return any(getattr(self.old_spec, name) != getattr(self.spec, name) for name in _LIMITS)

    @property
    def claimed(self) -> tuple[ClaimKey, ...]:
        """The GPUs and ports that the container does not have before the change."""
        return _without(claim_keys(self.placement), claim_keys(self.old_placement))

    @property
    def released(self) -> tuple[ClaimKey, ...]:
        """The GPUs and ports that the container does not have after the change."""
        return _without(claim_keys(self.old_placement), claim_keys(self.placement))

    @property
    def recorded(self) -> JsonObject:
        """The plan as the operation records it: of the old spec, only what the saga needs, since it can be large."""
        return self.model_dump(mode="json", exclude={"old_spec": {"labels", "env"}})

    @property
    def shown(self) -> OperationPlan:
        """The plan as callers see it."""
        before, after = self.old_placement, self.placement
        return OperationPlan(
            placement=after,
            kept_gpu_uuids=tuple(uuid for uuid in after.gpu_uuids if uuid in before.gpu_uuids),
            released_gpu_uuids=_without(before.gpu_uuids, after.gpu_uuids),
            claimed_gpu_uuids=_without(after.gpu_uuids, before.gpu_uuids),
            claimed_ports=_without(after.ports, before.ports),
            bytes_to_move=self.transfer.bytes_to_move + self.keep.bytes_to_move + self.source.bytes_to_move,
            bytes_available=self.transfer.bytes_available or self.keep.bytes_available,
            restarts_process=self.stops_process,
            carry_method=self.transfer.method,
            snapshot=self.keep.kind,
            warnings=(*self.transfer.warnings, *self.keep.warnings, *self.source.warnings),
            old_spec=self.old_spec,
            new_spec=self.spec,
        )


def _with_method(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A plan from the arguments of the version that recorded a flag for each thing that a change does."""
    true = {name for name in _FLAGS if recorded.get(name)}
    method_without_successor = ChangeMethod.RESTART if "start" in true else ChangeMethod.IN_PLACE
    active_state = ContainerState.PAUSED if "frozen" in true else ContainerState.RUNNING
    allowed_exits = AllowedExits.NONE if "must_live" in true else AllowedExits.ZERO
    watched = "start" in true and not true.isdisjoint({"replace", "verify"})
    return {name: value for name, value in recorded.items() if name not in (*_FLAGS, "carry")} | {
        "method": ChangeMethod.REPLACE if "replace" in true else method_without_successor,
        "old_state": active_state if "was_running" in true else ContainerState.STOPPED,
        # No change stopped a process without starting one, so what ran before the change runs after it.
        "runs": not true.isdisjoint({"start", "was_running"}),
        "allowed_exits": (AllowedExits.ANY if "may_end" in true else allowed_exits) if watched else None,
        "transfer": {"method": recorded.get("carry", LayerTransferMethod.NONE)},
    }


def _without(items: Sequence[_T], excluded: Sequence[_T]) -> tuple[_T, ...]:
    return tuple(item for item in items if item not in excluded)
