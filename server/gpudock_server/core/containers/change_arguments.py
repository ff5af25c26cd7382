"""The recorded arguments of a change of a container, from which its saga is rebuilt."""

from __future__ import annotations

from enum import StrEnum

from gpudock_server.core.containers.snapshots import SnapshotArguments
from gpudock_server.model.container import EngineBinding, Placement, RevisionCause
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.record import Record
from gpudock_server.model.snapshot import Snapshot
from gpudock_server.model.spec import ContainerSpec


class SuccessorFiles(StrEnum):
    """A successor's files: of the old engine container, a revision or the image; GRAFT: the old on another image."""

    CARRY = "CARRY"
    RESTORE = "RESTORE"
    FRESH = "FRESH"
    GRAFT = "GRAFT"


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


class ChangeArguments(Record):
    """The arguments from which the saga is rebuilt.

    `old`, `was_running`: the state when the operation began. `cause` None: no new revision. `frozen`: the container was
    paused, and is unpaused before it is stopped. `keep`: how the files of the old revision are kept. `prunes`: whether
    old revisions are pruned. `verify`: watch the process for `start_watch_seconds` even if nothing is replaced. A
    watched process that exits fails the start if its exit code is not 0; with `must_live` always; with `may_end` never.
    """

    old: EngineBinding
    old_spec: ContainerSpec
    old_placement: Placement
    spec: ContainerSpec
    placement: Placement
    revision: int
    was_running: bool
    frozen: bool = False
    stop: bool = False
    start: bool = False
    replace: bool = False
    limits: bool = False
    carry: LayerTransferMethod = LayerTransferMethod.NONE
    source: SuccessorSource = SuccessorSource()
    keep: SnapshotArguments = SnapshotArguments()
    prunes: bool = False
    stop_timeout: float | None = None
    must_live: bool = False
    may_end: bool = False
    verify: bool = False
    cause: RevisionCause | None = None
    owner: str = ""
    authenticated: bool = False
