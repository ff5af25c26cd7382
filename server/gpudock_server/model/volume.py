"""Volumes: what was asked for, what was made on the host, how full it is, and what all of them share."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from gpudock_server.model.record import Record
from gpudock_server.model.resource import ResourceKind, ResourceRef


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


class VolumeIdentity(Record):
    """What a volume's record says that its backing does not, and that never changes.

    Kept beside the files (`volume.json`) and on the engine volume (LABEL_VOLUME), so that a record that the store lost
    can be written again. `node` is empty and `create_time` None where a version wrote it that did not keep them.
    """

    node: str = ""
    owner: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    create_time: datetime | None = None


class BackingOnDisk(Record):
    """A store that is on this host's disk.

    `identity` is None where the store was made by a version that did not keep it, or is no volume's own: a copy that
    a resize was making. `damage` says why `backing` is None.
    """

    uid: str
    folder: str
    backing: VolumeBacking | None = None
    identity: VolumeIdentity | None = None
    damage: str = ""


class VolumeState(StrEnum):
    """Where a volume is in its life. One that is DELETING can only be deleted: parts of it may be gone."""

    CREATING = "CREATING"
    READY = "READY"
    DELETING = "DELETING"


class Volume(Record):
    """The head of a volume's history.

    `size_bytes` 0 is no limit. `reserved_bytes` is what it may come to need of the pool: more than its size while it is
    being grown. `backing` is None until it is made. `mountpoint` is where the engine mounts it, with files there only
    while it does. `generation` counts the changes that users made. Which containers mount it is not recorded here:
    their specs say so.
    """

    name: str
    uid: str
    node: str
    owner: str
    generation: int
    revision: int
    state: VolumeState
    size_bytes: int
    reserved_bytes: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    backing: VolumeBacking | None = None
    mountpoint: str = ""
    create_time: datetime
    update_time: datetime

    @property
    def target(self) -> ResourceRef:
        """Names it as what an operation works on."""
        return ResourceRef(kind=ResourceKind.VOLUME, name=self.name, uid=self.uid)

    @property
    def identity(self) -> VolumeIdentity:
        """What is kept beside the files."""
        return VolumeIdentity(node=self.node, owner=self.owner, labels=self.labels, create_time=self.create_time)

    @property
    def etag(self) -> str:
        """Names this state of the user's intent; opaque to callers."""
        return f"{self.uid[:8]}.{self.generation}"

    def changed(self, **changes: object) -> Volume:
        """A copy with some fields replaced."""
        return self.model_copy(update=changes)


class VolumeCause(StrEnum):
    """What made a revision of a volume."""

    CREATED = "CREATED"
    GROWN = "GROWN"
    SHRUNK = "SHRUNK"
    ADOPTED = "ADOPTED"


class VolumeRevision(Record):
    """One immutable step of a volume's history: the size that it was given."""

    volume: str
    uid: str
    revision: int
    size_bytes: int
    cause: VolumeCause
    create_time: datetime
    operation_id: str


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
