"""Operations: what is being done to an object, how far it has come, and what each step made.

An operation is the journal of a saga. Its record is written before the first step and after every step, so that a
daemon that starts finds out exactly what the one before it had reached.
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
    """A UUID whose order, as text, is that of time backwards: a store that lists by id lists the newest first.

    Version 8 of RFC 9562: 60 bits of what is left until 60 bits of 16 ns ticks have passed since 1970 (in the year
    2554), and 62 random ones, of which the last 8 digits are part.
    """
    left = (1 << _TIME_BITS) - 1 - (time.time_ns() >> 4)
    high = (left >> 12 << 16) | 0x8000 | (left & 0xFFF)
    low = 1 << 63 | secrets.randbits(_RANDOM_BITS)
    return str(uuid.UUID(int=high << 64 | low))


class OperationKind(StrEnum):
    """What an operation does."""

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
    """PLANNED is the answer to `validate_only` and is never stored."""

    PLANNED = "PLANNED"
    RUNNING = "RUNNING"
    UNDOING = "UNDOING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self in (OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED)


class StageState(StrEnum):
    """Where a stage stands."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    DONE = "DONE"
    UNDONE = "UNDONE"


class Stage(Record):
    """One step of the saga. `facts` is what its `do` made, for whoever comes after, or undoes it."""

    name: str
    state: StageState = StageState.PENDING
    start_time: datetime | None = None
    end_time: datetime | None = None
    current_bytes: int = 0
    total_bytes: int = 0
    facts: JsonObject = Field(default_factory=dict)


class LayerTransferMethod(StrEnum):
    """How a writable layer gets from an engine container to its successor."""

    NONE = "NONE"
    EXCHANGE = "EXCHANGE"
    COPY = "COPY"
    COMMIT = "COMMIT"


class OperationPlan(Record):
    """What an operation will do, known before it begins.

    `placement` is what the container has afterwards; on `validate_only`, what it would have been given just now.
    `apparent_bytes` and `allocated_bytes` are those of the files that are read: without and with regard to their holes.
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
    # What the spec is before and afterwards, where it can change. Of a plan alone: a record has no room for two specs.
    old_spec: ContainerSpec | None = Field(default=None, exclude=True)
    new_spec: ContainerSpec | None = Field(default=None, exclude=True)


class RecordedError(Record):
    """A domain error as it is kept with an ended operation. `code` is a number of google.rpc.Code."""

    code: int
    reason: str
    message: str
    metadata: dict[str, str] = Field(default_factory=dict)


# What an operation leaves, and its caller is shown.
Result: TypeAlias = Container | CommittedImage | Volume


class Operation(Record):
    """A change of one object, from its lock to its result.

    `locks` are what it has locked besides its target. `committed`: past the point of no return, it is only driven
    forward. `arguments` belong to the saga of its kind.
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
        """The stage that is running; empty when none is."""
        return next((stage.name for stage in self.stages if stage.state is StageState.RUNNING), "")

    def facts(self, stage_name: str) -> JsonObject:
        """What a stage made; empty when it has not been done."""
        return next((stage.facts for stage in self.stages if stage.name == stage_name), {})

    @property
    def locked(self) -> tuple[ResourceRef, ...]:
        """Everything that no other operation may touch while this one is at work."""
        return (self.target, *self.locks)

    def changed(self, **changes: object) -> Operation:
        """A copy with some fields replaced."""
        return self.model_copy(update=changes)

    def with_stage(self, index: int, **changes: object) -> Operation:
        """A copy with one stage's fields replaced."""
        stages = list(self.stages)
        stages[index] = stages[index].model_copy(update=changes)
        return self.changed(stages=tuple(stages))


class RequestRecord(Record):
    """What a `request_id` stood for: the operation it began, and a digest of the arguments it came with."""

    operation_id: str
    digest: str
