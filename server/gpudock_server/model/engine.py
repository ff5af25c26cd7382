"""What the engine shows, in our words."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from pydantic import Field

from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.record import Record
from gpudock_server.model.spec import ContainerSpec, RestartPolicy

LABEL_UID = "gpudock.uid"
LABEL_NAME = "gpudock.name"
LABEL_NODE = "gpudock.node"
LABEL_REVISION = "gpudock.revision"
LABEL_OPERATION = "gpudock.operation"
LABEL_OWNER = "gpudock.owner"
LABEL_SPEC = "gpudock.spec"
LABEL_VOLUME = "gpudock.volume"
# An operator's consent to adopt an engine volume: `true`.
LABEL_ADOPT = "gpudock.adopt"
RESERVED_LABEL_PREFIX = "gpudock."


class EngineInfo(Record):
    """The engine itself. `memory_bytes` is the host's; `root_dir` is a path on the engine's host."""

    id: str
    version: str
    api_version: str
    storage_driver: str
    root_dir: str
    cpus: int
    memory_bytes: int


class HostCapacity(Record):
    """What the engine's host has: no container can be given more. 0 is not known."""

    cpus: int = 0
    memory_bytes: int = 0


class EngineImage(Record):
    """An image that the engine has.

    `volumes` are the targets of its VOLUME lines; `layers` the digests of its layers, the lowest first. `layer_paths`
    are the folders with their files on the engine's host, the highest first; empty where the engine does not show them
    (the containerd image store, another storage driver than overlay2).
    """

    id: str
    size_bytes: int = 0
    env: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    layer_paths: tuple[str, ...] = ()


class ImageAccounts(Record):
    """The names of the users and groups of an image."""

    users: frozenset[str]
    groups: frozenset[str]

    def missing(self, user: str) -> str:
        """What of `user` or `user:group` is a name that the image lacks, such as "user 'x'"; empty for nothing.

        A number needs no entry. See libcontainer's user.GetExecUser, which the engine starts processes by.
        """
        name, _, group = user.partition(":")
        for kind, wanted, names in (("user", name, self.users), ("group", group, self.groups)):
            if wanted and not wanted.isdigit() and wanted not in names:
                return f"{kind} {wanted!r}"
        return ""


class EngineVolume(Record):
    """An engine volume. `mountpoint` is a path on the engine's host, with files in it only while it is mounted.

    `hazard` says what of the host its options mount, which no tenant may reach by it; empty where they mount nothing of
    the host. `anonymous`: the engine made it for one container, by itself.
    """

    name: str
    driver: str
    mountpoint: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    options: dict[str, str] = Field(default_factory=dict)
    hazard: str = ""
    anonymous: bool = False


class EngineState(StrEnum):
    """The engine's own words for a container's state."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    RESTARTING = "restarting"
    REMOVING = "removing"
    EXITED = "exited"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class EngineContainer:
    """An engine container as inspect shows it.

    `upper_dir` is the path of its writable layer on the engine's host; empty where the engine does not show one (the
    containerd image store, another storage driver than overlay2). `pid` is 0 unless it runs. `volumes` maps targets
    to the names of engine volumes mounted there, anonymous ones included; `binds` maps targets to paths of the engine's
    host. `ports` are those that it was made to
    publish, whether or not it runs, in no order of meaning. `spec` is what its label says it was made from; None where
    it has no such label, or one that this version cannot read. `oom_killed`: the kernel killed its main process, in the
    run that ended last, for memory; None where some process of that run was killed and nobody knows which.
    """

    id: str
    name: str
    image_id: str
    state: EngineState
    pid: int
    exit_code: int
    oom_killed: bool | None
    error: str
    labels: dict[str, str]
    gpu_uuids: tuple[str, ...]
    upper_dir: str = ""
    storage_driver: str = ""
    ports: tuple[PortBinding, ...] = ()
    spec: ContainerSpec | None = None
    volumes: dict[str, str] = field(default_factory=dict)
    binds: dict[str, str] = field(default_factory=dict)
    cpus: float = 0.0
    memory_bytes: int = 0
    pids_limit: int = 0
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    restart_count: int = 0
    health: str = ""
    create_time: datetime | None = None
    start_time: datetime | None = None
    finish_time: datetime | None = None

    @property
    def running(self) -> bool:
        """Whether a process of it lives, now or in a moment: also where the engine is about to start it again."""
        return self.alive or self.state is EngineState.RESTARTING

    @property
    def alive(self) -> bool:
        """Whether it has processes now; those of a paused one are frozen."""
        return self.state in (EngineState.RUNNING, EngineState.PAUSED)


@dataclass(frozen=True, slots=True)
class EngineContainerSpec:
    """Everything needed to create an engine container. `name` is unique to the operation that makes it.

    `spec` is kept with it (LABEL_SPEC), so that a record that the store lost can be written again from the engine.
    `volumes` (target -> engine volume) are anonymous volumes taken over from a predecessor. `mounted` (volume -> engine
    volume) says what the volumes of the spec are called by the engine; one that is missing there is called as it is.
    `bound` (host path -> path) says what the engine mounts for the host paths of the spec (ports.HostPaths).
    """

    name: str
    image_id: str
    spec: ContainerSpec
    placement: Placement
    hostname: str
    labels: dict[str, str]
    volumes: dict[str, str] = field(default_factory=dict)
    mounted: dict[str, str] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)


class NvidiaSwitch(StrEnum):
    """Variables by which NVIDIA's container toolkit adds devices beside the cards of NVIDIA_VISIBLE_DEVICES."""

    GDS = "NVIDIA_GDS"
    MOFED = "NVIDIA_MOFED"
    GDRCOPY = "NVIDIA_GDRCOPY"
    NVSWITCH = "NVIDIA_NVSWITCH"
    IMEX_CHANNELS = "NVIDIA_IMEX_CHANNELS"
    MIG_CONFIG_DEVICES = "NVIDIA_MIG_CONFIG_DEVICES"
    MIG_MONITOR_DEVICES = "NVIDIA_MIG_MONITOR_DEVICES"


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """What one container may use at most, and what it may use where its spec says nothing. 0 is without a limit.

    A container whose spec has no memory limit gets `max_memory_bytes`.
    """

    max_memory_bytes: int = 0
    max_pids: int = 32768
    default_pids: int = 4096


@dataclass(frozen=True, slots=True)
class ContainerDefaults:
    """What every engine container is created with, whatever its spec says; an operator's choice for the node.

    A spec or an image may set `allowed_nvidia_switches`; all others are off.
    """

    limits: NodeLimits = NodeLimits()
    drop_net_raw: bool = True
    no_new_privileges: bool = False
    allowed_nvidia_switches: frozenset[NvidiaSwitch] = frozenset()


class EngineEventKind(StrEnum):
    """The events that change what we know of a container."""

    START = "start"
    DIE = "die"
    OOM = "oom"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    DESTROY = "destroy"
    HEALTH = "health_status"
    RENAME = "rename"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something happened to one of our engine containers. `time_nanos` is a resume token for `Engine.events`."""

    kind: EngineEventKind
    engine_id: str
    labels: dict[str, str]
    time_nanos: int


@dataclass(frozen=True, slots=True)
class RegistryAuth:
    """Credentials for one pull; they live in memory only and are never stored or logged."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    server_address: str = ""


class ExecStream(StrEnum):
    """Which of a process's outputs a chunk came from; with a TTY everything is STDOUT."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """A process to run inside a running container. `size` is (rows, columns) of its terminal."""

    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    working_dir: str = ""
    user: str = ""
    tty: bool = False
    stdin: bool = False
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ExecStatus:
    """How an exec stands; `exit_code` is None while it runs. `pid` is of the engine's host, 0 before it started."""

    running: bool
    exit_code: int | None
    pid: int
