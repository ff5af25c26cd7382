"""Records of the engine: containers, images, volumes, events and execs."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from pydantic import Field

from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.names import engine_container_name
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
# `true` is the operator's consent to adopt an engine volume.
LABEL_ADOPT = "gpudock.adopt"
RESERVED_LABEL_PREFIX = "gpudock."


class EngineInfo(Record):
    """The engine. `cpus` and `memory_bytes` are those of its host; `root_dir` is a path on its host."""

    id: str
    version: str
    api_version: str
    storage_driver: str
    root_dir: str
    cpus: int
    memory_bytes: int


class HostCapacity(Record):
    """CPUs and memory of the engine's host, the upper limit of every container. 0: unknown."""

    cpus: int = 0
    memory_bytes: int = 0


class EngineImage(Record):
    """An image in the engine.

    `volumes` are the targets of its VOLUME lines; `layers` are the digests of its layers, lowest first. `layer_paths`
    are the directories with the files of the layers on the engine's host, highest first; empty if the engine does not
    show them (the containerd image store, a storage driver other than overlay2).
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
        """The name in `user` or `user:group` that the image does not have, such as "user 'x'"; empty if it has all.

        Numbers need no entry: see libcontainer's user.GetExecUser, which the engine uses to start processes.
        """
        name, _, group = user.partition(":")
        for kind, entry, names in (("user", name, self.users), ("group", group, self.groups)):
            if entry and not entry.isdigit() and entry not in names:
                return f"{kind} {entry!r}"
        return ""


class EngineVolume(Record):
    """An engine volume. `mountpoint` is a path on the engine's host; files are visible there only while it is mounted.

    `hazard` says what its options mount from the host, which tenants must not reach; empty if they mount nothing from
    the host. `anonymous`: the engine created it for one container.
    """

    name: str
    driver: str
    mountpoint: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    options: dict[str, str] = Field(default_factory=dict)
    hazard: str = ""
    anonymous: bool = False


class EngineState(StrEnum):
    """The state of a container in the words of the engine."""

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

    `upper_dir` is the path of its writable layer on the engine's host; empty if the engine does not report one (the
    containerd image store, a storage driver other than overlay2). `pid` is 0 unless it runs. `volumes` maps targets to
    the engine volumes that are mounted there, including anonymous ones; `binds` maps targets to paths on the engine's
    host. `ports` are those that it was created to publish, whether it runs or not, in no particular order. `spec` comes
    from its label; None if there is no such label or this version cannot read it. `oom_killed`: the out-of-memory
    killer ended the main process of the last run; None if it killed some process of that run and it is unknown which.
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
    def created_name(self) -> str:
        """The name that gpudock created it with; it may have been renamed since."""
        return engine_container_name(self.labels.get(LABEL_NAME, ""), self.labels.get(LABEL_OPERATION, ""))

    @property
    def running(self) -> bool:
        """Whether it has processes, or the engine is about to start it again."""
        return self.alive or self.state is EngineState.RESTARTING

    @property
    def alive(self) -> bool:
        """Whether it has processes now, which are frozen if it is paused."""
        return self.state in (EngineState.RUNNING, EngineState.PAUSED)


@dataclass(frozen=True, slots=True)
class EngineContainerSpec:
    """Everything needed to create an engine container. `name` is unique to the operation that creates it.

    `spec` is stored in its label LABEL_SPEC, so that a record that the store lost can be rebuilt from the engine.
    `volumes` (target -> engine volume) are the anonymous volumes of the predecessor. `mounted` (volume -> engine
    volume) holds the names of the spec's volumes in the engine; a volume that is missing there has the same name in the
    engine. `bound` (host path -> path) holds what the engine mounts for the host paths of the spec (ports.HostPaths).
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
    """Variables with which NVIDIA's container toolkit adds devices other than the GPUs of NVIDIA_VISIBLE_DEVICES."""

    GDS = "NVIDIA_GDS"
    MOFED = "NVIDIA_MOFED"
    GDRCOPY = "NVIDIA_GDRCOPY"
    NVSWITCH = "NVIDIA_NVSWITCH"
    IMEX_CHANNELS = "NVIDIA_IMEX_CHANNELS"
    MIG_CONFIG_DEVICES = "NVIDIA_MIG_CONFIG_DEVICES"
    MIG_MONITOR_DEVICES = "NVIDIA_MIG_MONITOR_DEVICES"


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """Maximum and default limits of one container; 0: unlimited.

    A container whose spec has no memory limit gets `max_memory_bytes`.
    """

    max_memory_bytes: int = 0
    max_pids: int = 32768
    default_pids: int = 4096


@dataclass(frozen=True, slots=True)
class ContainerDefaults:
    """Options of the node's operator that apply to every engine container, with any spec.

    A spec or an image may set `allowed_nvidia_switches`; all others are disabled.
    """

    limits: NodeLimits = NodeLimits()
    drop_net_raw: bool = True
    no_new_privileges: bool = False
    allowed_nvidia_switches: frozenset[NvidiaSwitch] = frozenset()


class EngineEventKind(StrEnum):
    """Engine events that change the status of a container."""

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
    """An event of a gpudock engine container. `time_nanos` is a resume token for `Engine.events`."""

    kind: EngineEventKind
    engine_id: str
    labels: dict[str, str]
    time_nanos: int


@dataclass(frozen=True, slots=True)
class RegistryAuth:
    """Credentials for one pull; kept in memory only, never stored or logged."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    server_address: str = ""


class ExecStream(StrEnum):
    """The output stream of a chunk; with a TTY all output is STDOUT."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """The size of a terminal in characters, in the order of the contract; the engine has rows first."""

    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """A process to run inside a running container. `size` is the size of its terminal."""

    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    working_dir: str = ""
    user: str = ""
    tty: bool = False
    stdin: bool = False
    size: TerminalSize | None = None


@dataclass(frozen=True, slots=True)
class ExecStatus:
    """The status of an exec. `exit_code` is None while it runs. `pid` is that of the engine's host; 0: not started.

    `start_error` says why the program could not be started; then the exit code is 127 if it was not found, else 126.
    """

    running: bool
    exit_code: int | None
    pid: int
    start_error: str = ""
