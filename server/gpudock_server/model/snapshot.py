"""Snapshots: the files of a container's writable layer at the end of a revision."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import Field, field_validator

from gpudock_server.model.record import Record


class SnapshotKind(StrEnum):
    """TREE: a folder with the files of the layer. IMAGE: an image that the engine committed from the layer."""

    TREE = "TREE"
    IMAGE = "IMAGE"


class SnapshotMethod(StrEnum):
    """How a TREE shares unchanged data with others: extents of the filesystem, or whole files as hard links."""

    REFLINK = "REFLINK"
    LINK = "LINK"


class SnapshotKey(Record):
    """The container and the revision of a snapshot. Paths are built from it, so `uid` must be a UUID."""

    uid: str
    revision: int = Field(ge=1)

    @field_validator("uid")
    @classmethod
    def _is_uuid(cls, value: str) -> str:
        if str(UUID(value)) != value:
            raise ValueError(f"container uid {value!r} is not a lower-case UUID")
        return value


class Snapshot(Record):
    """The record of a sealed snapshot; it never changes.

    `image_id` is the image below a TREE, or the image of an IMAGE; `reference` is the name of an IMAGE. `layer_bytes`
    is its size on disk, every inode counted once; `new_bytes` is what it added to the disk when it was made.
    """

    kind: SnapshotKind
    image_id: str
    reference: str = ""
    method: SnapshotMethod | None = None
    layer_bytes: int = 0
    entries: int = 0
    new_bytes: int = 0
    create_time: datetime


class SnapshotSkipped(Record):
    """Why the snapshot that the policy required was not made."""

    reason: str
