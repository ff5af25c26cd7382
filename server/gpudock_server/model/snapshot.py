"""Snapshots: the files of a container's writable layer as they were when a revision ended."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import Field, field_validator

from gpudock_server.model.record import Record


class SnapshotKind(StrEnum):
    """A TREE is a folder with the layer's files; an IMAGE is what the engine's commit made of them."""

    TREE = "TREE"
    IMAGE = "IMAGE"


class SnapshotMethod(StrEnum):
    """How a TREE shares with others what is unchanged: extents of the filesystem, or whole files by hard link."""

    REFLINK = "REFLINK"
    LINK = "LINK"


class SnapshotKey(Record):
    """Whose snapshot it is, and of which revision. Paths are made of this, so it holds nothing but what it says."""

    uid: str
    revision: int = Field(ge=1)

    @field_validator("uid")
    @classmethod
    def _is_uuid(cls, value: str) -> str:
        if str(UUID(value)) != value:
            raise ValueError("a container's uid is a UUID in lower case with dashes")
        return value


class Snapshot(Record):
    """What is known of a sealed snapshot; it never changes.

    `image_id` is the image that a TREE lies on, or that an IMAGE is; `reference` the name of an IMAGE. `layer_bytes`
    are what all of it takes on disk, every inode once; `new_bytes` what this one added to that when it was made.
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
    """Why no snapshot was made of a revision for which the policy asked for one."""

    reason: str
