"""Container specs. A spec belongs to the user: it is stored as it was sent and never rewritten."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from enum import StrEnum

from pydantic import Field

from gpudock_server.model.record import Record

# The fields that can change without a new engine container.
IN_PLACE_FIELDS = frozenset(
    {"gpus", "ports", "cpus", "memory_bytes", "pids_limit", "labels", "restart_policy", "revision_policy"}
)


class GpuRequest(Record):
    """The GPUs that a container requests; all conditions must hold.

    `count` 0 without `uuids`: no GPU. `uuids`: exactly these GPUs; `count` is then their number or 0. `model` is a
    case-insensitive substring of the GPU's name. `min_memory_bytes` is compared with the total memory of a GPU.
    """

    count: int = 0
    uuids: tuple[str, ...] = ()
    model: str = ""
    min_memory_bytes: int = 0

    @property
    def size(self) -> int:
        """Return the number of requested GPUs."""
        return len(self.uuids) or self.count


class TmpfsMount(Record):
    """A tmpfs; its files are lost when the container stops. `size_bytes` 0: the default of tmpfs (half of RAM)."""

    size_bytes: int = 0
    mode: int = 0o1777


class Mount(Record):
    """A mount of exactly one of `volume`, `host_path`, `tmpfs` at `target`, an absolute path in the container."""

    volume: str = ""
    host_path: str = ""
    tmpfs: TmpfsMount | None = None
    target: str
    read_only: bool = False


class Protocol(StrEnum):
    """Transport protocol of a published port."""

    TCP = "tcp"
    UDP = "udp"


class PortRequest(Record):
    """A port to publish. `host_port` 0: one from the node's port_range is assigned."""

    container_port: int
    protocol: Protocol = Protocol.TCP
    host_port: int = 0


class RestartPolicyKind(StrEnum):
    """When the engine restarts a container."""

    NO = "no"
    ALWAYS = "always"
    UNLESS_STOPPED = "unless-stopped"
    ON_FAILURE = "on-failure"


class RestartPolicy(Record):
    """A restart policy. `max_retry_count` applies to ON_FAILURE only; 0: unlimited."""

    kind: RestartPolicyKind = RestartPolicyKind.NO
    max_retry_count: int = 0

    @property
    def as_engine_policy(self) -> RestartPolicy:
        """Return the policy that the engine gets.

        UNLESS_STOPPED replaces ALWAYS: an engine that restarts starts all containers with ALWAYS, including those that
        a user stopped, which have released their GPUs and ports. The engine refuses a count with any policy except
        ON_FAILURE.
        """
        kind = RestartPolicyKind.UNLESS_STOPPED if self.kind is RestartPolicyKind.ALWAYS else self.kind
        return RestartPolicy(
            kind=kind, max_retry_count=self.max_retry_count if kind is RestartPolicyKind.ON_FAILURE else 0
        )

    def __str__(self) -> str:
        """Format the policy as for `docker run --restart`."""
        return f"{self.kind.value}:{self.max_retry_count}" if self.max_retry_count else self.kind.value


class HealthCheck(Record):
    """A command (exec form) that checks the health of the container; exit code 0: healthy."""

    command: tuple[str, ...]
    interval: timedelta = timedelta(seconds=30)
    timeout: timedelta = timedelta(seconds=30)
    start_period: timedelta = timedelta(0)
    retries: int = 3


class SnapshotPolicy(StrEnum):
    """Whether a replaced revision gets a snapshot. CHEAP: only if nothing has to be copied."""

    ALWAYS = "ALWAYS"
    CHEAP = "CHEAP"
    NEVER = "NEVER"


class RevisionPolicy(Record):
    """How much of a container's history is kept. None and 0: the settings of the node apply."""

    snapshots: SnapshotPolicy | None = None
    keep_revisions: int = 0
    keep_for: timedelta | None = None


class ContainerSpec(Record):
    """The desired state of a container. Zero and empty: the default of the image or the engine."""

    image: str
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    working_dir: str = ""
    user: str = ""
    hostname: str = ""
    tty: bool = False
    stdin: bool = False
    labels: dict[str, str] = Field(default_factory=dict)
    gpus: GpuRequest = GpuRequest()
    cpus: float = 0.0
    memory_bytes: int = 0
    shm_size_bytes: int = 0
    pids_limit: int = 0
    mounts: tuple[Mount, ...] = ()
    ports: tuple[PortRequest, ...] = ()
    restart_policy: RestartPolicy = RestartPolicy()
    stop_signal: str = ""
    stop_timeout: timedelta | None = None
    health_check: HealthCheck | None = None
    revision_policy: RevisionPolicy = RevisionPolicy()

    def changed(self, **changes: object) -> ContainerSpec:
        """Return a copy with some fields replaced."""
        return self.model_copy(update=changes)

    @property
    def host_paths(self) -> tuple[str, ...]:
        """Return the host paths that it mounts, without duplicates."""
        return tuple(dict.fromkeys(mount.host_path for mount in self.mounts if mount.host_path))

    @property
    def fixed_digest(self) -> str:
        """Return a digest (hex SHA-256) of all fields that cannot change without a new engine container.

        Specs with the same digest can use the same engine container: GPUs and published ports are compared by what was
        assigned, and the engine can update the other IN_PLACE_FIELDS.
        """
        return hashlib.sha256(self.model_dump_json(exclude=set(IN_PLACE_FIELDS)).encode()).hexdigest()
