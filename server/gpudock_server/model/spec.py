"""What a user asks for. A spec is the user's: the server stores it as it came and never rewrites it."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from enum import StrEnum

from pydantic import Field

from gpudock_server.model.record import Record

# What the engine can change in a container that exists. Everything else needs a new engine container.
IN_PLACE_FIELDS = frozenset(
    {"gpus", "ports", "cpus", "memory_bytes", "pids_limit", "labels", "restart_policy", "revision_policy"}
)


class GpuRequest(Record):
    """Which cards a container asks for; all conditions hold together.

    `count` 0 with no `uuids` is a container without a card. `uuids` pins: exactly these, and `count` is their number
    or 0. `model` matches a card's name, case-insensitively, as a substring. `min_memory_bytes` is a card's total.
    """

    count: int = 0
    uuids: tuple[str, ...] = ()
    model: str = ""
    min_memory_bytes: int = 0

    @property
    def size(self) -> int:
        """How many cards this asks for."""
        return len(self.uuids) or self.count


class TmpfsMount(Record):
    """Memory that is mounted; gone when the container stops. `size_bytes` 0 is the engine's default (half of RAM)."""

    size_bytes: int = 0
    mode: int = 0o1777


class Mount(Record):
    """Exactly one of `volume`, `host_path`, `tmpfs` at `target`, an absolute path inside."""

    volume: str = ""
    host_path: str = ""
    tmpfs: TmpfsMount | None = None
    target: str
    read_only: bool = False


class Protocol(StrEnum):
    """Transport of a published port."""

    TCP = "tcp"
    UDP = "udp"


class PortRequest(Record):
    """A port to publish; `host_port` 0 takes one from the node's range."""

    container_port: int
    protocol: Protocol = Protocol.TCP
    host_port: int = 0


class RestartPolicyKind(StrEnum):
    """When the engine starts a container again by itself."""

    NO = "no"
    ALWAYS = "always"
    UNLESS_STOPPED = "unless-stopped"
    ON_FAILURE = "on-failure"


class RestartPolicy(Record):
    """`max_retry_count` counts for ON_FAILURE only; 0 is without end."""

    kind: RestartPolicyKind = RestartPolicyKind.NO
    max_retry_count: int = 0

    @property
    def as_engine_policy(self) -> RestartPolicy:
        """What the engine is told.

        An engine that restarts brings back everything whose policy is ALWAYS, also what a user had stopped. Here a
        stopped container has released its cards and ports, and another may hold them by then: UNLESS_STOPPED brings
        back the rest. A count beside any policy but ON_FAILURE is refused.
        """
        kind = RestartPolicyKind.UNLESS_STOPPED if self.kind is RestartPolicyKind.ALWAYS else self.kind
        return RestartPolicy(
            kind=kind, max_retry_count=self.max_retry_count if kind is RestartPolicyKind.ON_FAILURE else 0
        )

    def __str__(self) -> str:
        """As `docker run --restart` takes it."""
        return f"{self.kind.value}:{self.max_retry_count}" if self.max_retry_count else self.kind.value


class HealthCheck(Record):
    """A command (exec form) that tells whether the container is well; exit code 0 is healthy."""

    command: tuple[str, ...]
    interval: timedelta = timedelta(seconds=30)
    timeout: timedelta = timedelta(seconds=30)
    start_period: timedelta = timedelta(0)
    retries: int = 3


class SnapshotPolicy(StrEnum):
    """Whether the files of a revision are kept when the next one replaces it. CHEAP: where nothing is copied."""

    ALWAYS = "ALWAYS"
    CHEAP = "CHEAP"
    NEVER = "NEVER"


class RevisionPolicy(Record):
    """How much of a container's history is kept. None and 0: as the node's settings say."""

    snapshots: SnapshotPolicy | None = None
    keep_revisions: int = 0
    keep_for: timedelta | None = None


class ContainerSpec(Record):
    """Everything a user can ask of a container. Zero and empty mean: the image's or the engine's default."""

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
        """A copy with some fields replaced."""
        return self.model_copy(update=changes)

    @property
    def host_paths(self) -> tuple[str, ...]:
        """The host paths that it mounts, each once."""
        return tuple(dict.fromkeys(mount.host_path for mount in self.mounts if mount.host_path))

    @property
    def fixed_digest(self) -> str:
        """Names everything in the spec that an engine container keeps for life (hex SHA-256).

        Two specs with the same digest can be served by the same engine container: cards and published ports are
        compared by what was assigned, and the rest of IN_PLACE_FIELDS the engine can update.
        """
        return hashlib.sha256(self.model_dump_json(exclude=set(IN_PLACE_FIELDS)).encode()).hexdigest()
