"""Volumes as a backend sees them: what was made on the host, how full it is, and what all of them share."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from gpudock_server.model.record import Record


class VolumeBackendKind(StrEnum):
    """What a volume is made of. One that was made on a kind stays on it."""

    PROJECT_QUOTA = "PROJECT_QUOTA"
    LOOP = "LOOP"
    PLAIN = "PLAIN"


class VolumeBacking(Record):
    """Everything needed to find a volume's store again, on this host and after a reboot.

    `uid` is the store's own, a UUID: a volume that is copied to a new store gets one with another uid. `name` is the
    volume's, for people and messages alone. `folder` is the store's folder on the host (empty: the engine keeps it
    where it likes). `engine_volume` and `driver_options` are what the engine has to be given; they never change.
    `filesystem` is empty, and `project_id` 0, where a kind has none. `size_bytes` 0 is no limit.
    """

    kind: VolumeBackendKind
    uid: str
    name: str
    engine_volume: str
    size_bytes: int = 0
    filesystem: str = ""
    folder: str = ""
    project_id: int = 0
    driver_options: dict[str, str] = Field(default_factory=dict)


class VolumeUsage(Record):
    """How full a volume is, as `df` in a container shows it. `minimum_bytes` is the least size it can shrink to.

    `size_bytes` is 0 where there is no limit.
    """

    used_bytes: int
    size_bytes: int
    minimum_bytes: int


class PoolUsage(Record):
    """The filesystem that sized volumes share.

    `free_bytes` is what root may still write. `promised_bytes` is the sum of the volumes' sizes, `allocated_bytes` what
    they have of it: promised less allocated is what may still be asked of `free_bytes`.
    """

    total_bytes: int
    free_bytes: int
    promised_bytes: int
    allocated_bytes: int


class TreeSummary(Record):
    """What a tree of files holds: its entries, the bytes inside its files, and a digest of content and metadata."""

    entries: int
    content_bytes: int
    sha256: str
