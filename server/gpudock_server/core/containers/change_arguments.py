"""What is recorded of a change of a container, so that its saga can be built again."""

from __future__ import annotations

from enum import StrEnum

from gpudock_server.core.containers.snapshots import SnapshotArguments
from gpudock_server.model.container import EngineBinding, Placement, RevisionCause
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.record import Record
from gpudock_server.model.snapshot import Snapshot
from gpudock_server.model.spec import ContainerSpec


class SuccessorFiles(StrEnum):
    """What a successor's files are. GRAFT: those of the old one, on another image."""

    CARRY = "CARRY"
    RESTORE = "RESTORE"
    FRESH = "FRESH"
    GRAFT = "GRAFT"


class SuccessorSource(Record):
    """Where a successor and its files come from.

    `image_id` is what it is made from, or grafted on; empty is the old one's, or, for FRESH and GRAFT, what is pulled
    first, while the engine has `present_id` under that name. `revision` is the one whose files are brought back, and
    `snapshot` how they were kept. `fetch`: the engine does not have `image_id`, which the spec's image was when the
    revision was made, and it is pulled first.
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
    """What the saga needs to be built again.

    `old` and `was_running` are how things stood when the operation began. `cause` None makes no revision.
    `frozen`: it was paused, and is thawed before it is stopped. `keep` says how the files of the revision that ends
    are kept, `prunes` whether older ones go then. `verify`: the process is watched also where nothing is
    replaced, for `start_watch_seconds`. A process that ends while it is watched with another code than 0 is a
    failed start; with `must_live`, with any code; with `may_end`, with none.
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
