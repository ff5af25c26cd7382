"""Operations: changes of an object, with their stages and the results of each stage.

An operation is the journal of a saga. Its record is written before the first step and after every step, so that the
next daemon knows exactly which step was reached.
"""

from __future__ import annotations

import secrets
import time
import uuid
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

from pydantic import Field

from gpudock_server.model.container import Container, Placement, PortBinding
from gpudock_server.model.image import CommittedImage
from gpudock_server.model.record import JsonObject, Record
from gpudock_server.model.resource import ResourceRef
from gpudock_server.model.snapshot import SnapshotKind
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.volume import Volume

_TIME_BITS, _RANDOM_BITS = 60, 62


def new_operation_id() -> str:
    """Return a new UUID; newer ids sort before older ones as text, so that a listing by id starts with the newest.

    Version 8 of RFC 9562: 60 bits of remaining time, in ticks of 16 ns until the year 2554 (2**60 ticks after 1970),
    then 62 random bits, which include the last 8 digits.
    """
    left = (1 << _TIME_BITS) - 1 - (time.time_ns() >> 4)
    high = (left >> 12 << 16) | 0x8000 | (left & 0xFFF)
    low = 1 << 63 | secrets.randbits(_RANDOM_BITS)
    return str(uuid.UUID(int=high << 64 | low))


class OperationKind(StrEnum):
    """The kind of change that an operation makes."""

    CREATE = "CREATE"
    START = "START"
    STOP = "STOP"
    RESTART = "RESTART"
    PAUSE = "PAUSE"
    UNPAUSE = "UNPAUSE"
    DELETE = "DELETE"
    SCALE = "SCALE"
    UPDATE = "UPDATE"
    ROLLBACK = "ROLLBACK"
    DELETE_REVISION = "DELETE_REVISION"
    COMMIT = "COMMIT"
    CLONE = "CLONE"
    CREATE_VOLUME = "CREATE_VOLUME"
    RESIZE_VOLUME = "RESIZE_VOLUME"
    DELETE_VOLUME = "DELETE_VOLUME"
    ADOPT_VOLUME = "ADOPT_VOLUME"


class OperationState(StrEnum):
    """The state of an operation. PLANNED is the answer to `validate_only` and is never stored."""

    PLANNED = "PLANNED"
    RUNNING = "RUNNING"
    UNDOING = "UNDOING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether the operation has ended."""
        return self in (OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED)


class StageState(StrEnum):
    """The state of a stage."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    DONE = "DONE"
    UNDONE = "UNDONE"


class Stage(Record):
    """One step of the saga. `facts` is the result of its `do`, for later steps and for the undo."""

    name: str
    state: StageState = StageState.PENDING
    start_time: datetime | None = None
    end_time: datetime | None = None
    current_bytes: int = 0
    total_bytes: int = 0
    facts: JsonObject = Field(default_factory=dict)


class LayerTransferMethod(StrEnum):
    """How a writable layer is transferred from an engine container to its successor."""

    NONE = "NONE"
    EXCHANGE = "EXCHANGE"
    COPY = "COPY"
    COMMIT = "COMMIT"


class OperationPlan(Record):
    """What an operation will do; known before it begins.

    `placement` is that of the container afterwards; with `validate_only`, the one that it would be given now.
    `apparent_bytes` and `allocated_bytes` are the sizes of the files that are read: with their holes and without.
    """

    stages: tuple[str, ...] = ()
    placement: Placement = Placement()
    kept_gpu_uuids: tuple[str, ...] = ()
    claimed_gpu_uuids: tuple[str, ...] = ()
    released_gpu_uuids: tuple[str, ...] = ()
    claimed_ports: tuple[PortBinding, ...] = ()
    bytes_to_move: int = 0
    bytes_available: int = 0
    restarts_process: bool = False
    carry_method: LayerTransferMethod = LayerTransferMethod.NONE
    snapshot: SnapshotKind | None = None
    warnings: tuple[str, ...] = ()
    apparent_bytes: int = 0
    allocated_bytes: int = 0
    expected_freeze_seconds: float | None = None
    # The spec before and after the change. Only in plans: two specs do not fit into a record of the store.
    old_spec: ContainerSpec | None = Field(default=None, exclude=True)
    new_spec: ContainerSpec | None = Field(default=None, exclude=True)


class RecordedError(Record):
    """The domain error of an ended operation. `code` is a number of google.rpc.Code."""

    code: int
    reason: str
    message: str
    metadata: dict[str, str] = Field(default_factory=dict)


# The result of an operation that is returned to its caller.
Result: TypeAlias = Container | CommittedImage | Volume


class Operation(Record):
    """A change of one object, from its lock to its result.

    `locks` are the objects that it has locked besides its target. `committed`: the operation is past the point of no
    return and can only be completed. `arguments` are those of the saga of its kind.
    """

    id: str
    kind: OperationKind
    target: ResourceRef
    locks: tuple[ResourceRef, ...] = ()
    node: str
    state: OperationState
    stages: tuple[Stage, ...] = ()
    committed: bool = False
    cancel_requested: bool = False
    arguments: JsonObject = Field(default_factory=dict)
    plan: OperationPlan = OperationPlan()
    request_id: str = ""
    request_digest: str = ""
    message: str = ""
    error: RecordedError | None = None
    result: Result | None = None
    create_time: datetime
    update_time: datetime
    end_time: datetime | None = None

    @property
    def current_stage(self) -> str:
        """Return the name of the running stage; empty if none is running."""
        return next((stage.name for stage in self.stages if stage.state is StageState.RUNNING), "")

    def facts(self, stage_name: str) -> JsonObject:
        """Return the facts of a stage; empty if the stage is not done."""
        return next((stage.facts for stage in self.stages if stage.name == stage_name), {})

    @property
    def locked(self) -> tuple[ResourceRef, ...]:
        """Return all objects that this operation has locked."""
        return (self.target, *self.locks)

    def changed(self, **changes: object) -> Operation:
        """Return a copy with some fields replaced."""
        return self.model_copy(update=changes)

    def with_stage(self, index: int, **changes: object) -> Operation:
        """Return a copy with some fields of one stage replaced."""
        stages = list(self.stages)
        stages[index] = stages[index].model_copy(update=changes)
        return self.changed(stages=tuple(stages))


class RequestRecord(Record):
    """The operation that a `request_id` began, and a digest of the arguments of that request."""

    operation_id: str
    digest: str
