"""Volumes: records, backings on the host, usage, and the shared pool."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from gpudock_server.model.record import Record
from gpudock_server.model.resource import ResourceKind, ResourceRef


class VolumeBackendKind(StrEnum):
    """The kind of a volume's backing; it never changes."""

    PROJECT_QUOTA = "PROJECT_QUOTA"
    LOOP = "LOOP"
    PLAIN = "PLAIN"


class VolumeBacking(Record):
    """What holds the files of a volume: everything needed to find it again, after a reboot too.

    `uid` is a UUID of the backing: a volume whose files move to a new backing gets another one. `name` is the name of
    the volume, used in messages only. `folder` is the folder of the backing on the host (empty: the engine chooses the
    place). `engine_volume` and `driver_options` are passed to the engine; they never change. `filesystem` is empty and
    `project_id` is 0 for kinds without one. `size_bytes` 0: no limit.
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
    """The immutable fields of a volume's record that its backing does not have.

    Stored next to the files (`volume.json`) and on the engine volume (LABEL_VOLUME), so that a record that the store
    lost can be rebuilt. `node` is empty and `create_time` is None if an older version wrote it.
    """

    node: str = ""
    owner: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    create_time: datetime | None = None


class BackingOnDisk(Record):
    """A backing that was found on the disk of this host.

    `identity` is None if an older version made the backing, or if it is the copy of an unfinished resize. `damage` says
    why `backing` is None.
    """

    uid: str
    folder: str
    backing: VolumeBacking | None = None
    identity: VolumeIdentity | None = None
    damage: str = ""


class VolumeState(StrEnum):
    """The lifecycle state of a volume. DELETING: it can only be deleted, because parts of it may be gone."""

    CREATING = "CREATING"
    READY = "READY"
    DELETING = "DELETING"


class Volume(Record):
    """The current record (head) of a volume.

    `size_bytes` 0: no limit. `reserved_bytes` is what it may need of the pool: more than its size while it grows.
    `backing` is None until it is made. `mountpoint` is where the engine mounts it; files are visible there only while
    it is mounted. `generation` counts the changes by users. The containers that mount it are not recorded here: they
    follow from the specs of the containers.
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
        """Return the reference that operations use for their target."""
        return ResourceRef(kind=ResourceKind.VOLUME, name=self.name, uid=self.uid)

    @property
    def identity(self) -> VolumeIdentity:
        """Return the fields that are stored next to the files."""
        return VolumeIdentity(node=self.node, owner=self.owner, labels=self.labels, create_time=self.create_time)

    @property
    def etag(self) -> str:
        """Return the etag of this generation; opaque to callers."""
        return f"{self.uid[:8]}.{self.generation}"

    def changed(self, **changes: object) -> Volume:
        """Return a copy with some fields replaced."""
        return self.model_copy(update=changes)


class VolumeCause(StrEnum):
    """What created a revision of a volume."""

    CREATED = "CREATED"
    GROWN = "GROWN"
    SHRUNK = "SHRUNK"
    ADOPTED = "ADOPTED"


class VolumeRevision(Record):
    """One immutable revision in the history of a volume: the size that it was given."""

    volume: str
    uid: str
    revision: int
    size_bytes: int
    cause: VolumeCause
    create_time: datetime
    operation_id: str


class VolumeUsage(Record):
    """Usage of a volume, as `df` in a container shows it. `minimum_bytes` is the smallest size it can shrink to.

    `size_bytes` 0: no limit.
    """

    used_bytes: int
    size_bytes: int
    minimum_bytes: int


class PoolUsage(Record):
    """Usage of the filesystem that holds all volumes with a size.

    `free_bytes` is what root can still write. `promised_bytes` is the sum of the sizes of the volumes, and
    `allocated_bytes` what they already use: the difference may still be taken from `free_bytes`.
    """

    total_bytes: int
    free_bytes: int
    promised_bytes: int
    allocated_bytes: int


class TreeSummary(Record):
    """A file tree: number of entries, bytes in its files, and a digest of content and metadata."""

    entries: int
    content_bytes: int
    sha256: str
