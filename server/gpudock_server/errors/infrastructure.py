"""Errors about what the daemon depends on: disks, the container engine, the store."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

from gpudock_server.errors.base import Code, GpudockError


@dataclass(eq=False)
class DiskFull(GpudockError):
    """A filesystem has too little free space; it is checked before files are copied."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "DISK_FULL"
    template = "{path} has {available_bytes} free; {needed_bytes} are needed"
    path: str
    needed_bytes: int
    available_bytes: int


@dataclass(eq=False)
class PoolFull(DiskFull):
    """The sizes of all volumes together would exceed what the pool may promise."""

    template = "{path} has {available_bytes} unallocated; {needed_bytes} requested"


@dataclass(eq=False)
class EngineUnavailable(GpudockError):
    """The container engine did not answer; it may or may not have done what the call asked for."""

    code = Code.UNAVAILABLE
    reason = "ENGINE_UNAVAILABLE"
    template = "the container engine does not answer ({call}: {detail})"
    retry_after = timedelta(seconds=5)
    call: str
    detail: str


@dataclass(eq=False)
class EngineRejected(GpudockError):
    """The container engine answered with an error. `status` is the HTTP status of its answer."""

    code = Code.FAILED_PRECONDITION
    reason = "ENGINE_REJECTED"
    template = "the container engine refused to {call}: {detail}"
    call: str
    status: int
    detail: str


@dataclass(eq=False)
class StoreUnavailable(GpudockError):
    """etcd did not answer. A write may or may not have happened; a call with the same request_id finds out."""

    code = Code.UNAVAILABLE
    reason = "STORE_UNAVAILABLE"
    template = "etcd does not answer ({detail}); try again with the same request_id"
    retry_after: ClassVar[timedelta | None] = timedelta(seconds=5)
    detail: str


@dataclass(eq=False)
class StoreFull(StoreUnavailable):
    """etcd answers, but has no space for writes. Nothing was written."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "STORE_FULL"
    template = "the store is full: {detail}"
    retry_after = None


@dataclass(eq=False)
class OperationWaitsForSpace(StoreFull):
    """The store is full, so the result of an operation's step cannot be recorded. The operation has not ended."""

    template = (
        "the store is full: {detail}; operation {operation_id} waits at its last recorded step and continues when"
        " there is space"
    )
    operation_id: str


@dataclass(eq=False)
class RecordUnreadable(GpudockError):
    """The value of a key is not a record that this version can read."""

    code = Code.DATA_LOSS
    reason = "RECORD_UNREADABLE"
    template = "the record at {key} cannot be read: {detail}; restore it from a backup, or delete the key"
    key: str
    detail: str
