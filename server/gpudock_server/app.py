"""The composition root: builds the adapters and the use cases from the settings, and wires them into a Daemon.

Components are opened in the order of their dependencies, and closed in reverse by one exit stack.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import structlog

from gpudock_server import daemon
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.etcd import (
    EmbeddedEtcd,
    EtcdAddress,
    EtcdConnection,
    EtcdStore,
    EtcdTls,
    NodeLease,
    NodeTaken,
    this_process,
)
from gpudock_server.adapters.host.memory_and_disk import LocalHostUsage
from gpudock_server.adapters.host.port_probe import HostPortProbe
from gpudock_server.adapters.host.processes import HostProcessControl
from gpudock_server.adapters.host.trees.limits import Limits
from gpudock_server.adapters.host_paths import HostPathBinder, MountNamespace
from gpudock_server.adapters.layers import FolderRevisionBackupStore, OverlayLayerStore, OverlaySnapshotStore
from gpudock_server.adapters.nvml import NvmlInventory
from gpudock_server.adapters.volumes import (
    LoopBackend,
    MirrorVolumeCopier,
    PlainBackend,
    ProjectQuotaBackend,
    attach_all_volumes,
    check_versions,
)
from gpudock_server.core.assembly import NodeCore, NodePolicy, Ports
from gpudock_server.core.containers.history import HistoryDefaults
from gpudock_server.core.containers.images import ImagePolicy
from gpudock_server.core.exec.sessions import ExecSessions
from gpudock_server.core.nodes import Nodes
from gpudock_server.core.placement.allocator import Allocator
from gpudock_server.core.reconcile import DriftTracker
from gpudock_server.core.volumes.adoption_rules import AdoptionRules
from gpudock_server.core.watches import Watches
from gpudock_server.errors import EngineRejected, EngineUnavailable
from gpudock_server.logs import configure
from gpudock_server.model.claims import PortKey
from gpudock_server.model.engine import ContainerDefaults, HostCapacity, NodeLimits
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.record import now
from gpudock_server.model.spec import Protocol, SnapshotPolicy
from gpudock_server.model.volume import VolumeBackendKind
from gpudock_server.ports import (
    Engine,
    HostPaths,
    LayerStore,
    RevisionBackupStore,
    SnapshotStore,
    Store,
    VolumeBackend,
    VolumeCopier,
)
from gpudock_server.private_files import make_private_folder, read_private, require_private
from gpudock_server.rpc.server import Services, build_server
from gpudock_server.settings.definitions import (
    CommitReplace,
    LayerTransferChoice,
    Settings,
    VolumeBackendChoice,
    VolumeFilesystem,
)
from gpudock_server.startup import StartupError

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

VERSION = version("gpudock")
T = TypeVar("T")

_NODE_LEASE = timedelta(seconds=10)


def _unwrapped(port: T) -> T:
    return port


@dataclass(frozen=True, slots=True)
class PortWrappers:
    """Wrap each port before core gets it: fault tests inject their errors here. The default wraps nothing."""

    engine: Callable[[Engine], Engine] = _unwrapped
    store: Callable[[Store], Store] = _unwrapped
    layers: Callable[[LayerStore], LayerStore] = _unwrapped
    snapshots: Callable[[SnapshotStore], SnapshotStore] = _unwrapped
    host_paths: Callable[[HostPaths], HostPaths] = _unwrapped
    revision_backups: Callable[[RevisionBackupStore], RevisionBackupStore] = _unwrapped
    volumes: Callable[[VolumeBackend], VolumeBackend] = _unwrapped
    copier: Callable[[VolumeCopier], VolumeCopier] = _unwrapped


def run(settings: Settings, wrappers: PortWrappers | None = None) -> int:
    """Run the daemon until it is stopped; returns the exit code of the process.

    Raises StartupError for a misconfiguration, or when the engine or etcd cannot be used.
    """
    return daemon.run(settings, partial(_assemble, settings, wrappers or PortWrappers()))


async def _assemble(
    settings: Settings, wrappers: PortWrappers, stack: AsyncExitStack, shutdown: daemon.Shutdown
) -> daemon.Daemon:
    make_private_folder(settings.state_dir)
    start_time = now()
    port_range = (settings.port_range.first, settings.port_range.last)
    docker = await _open_engine(settings, stack)
    info = await docker.info()
    connection = await _open_etcd(settings, stack)
    store = await _open_store(settings, connection, stack)
    await _check_port_range(settings, store)
    lease = await _register(settings, connection, store, info.id, stack, lost=shutdown.on_node_taken_over)

    inventory = NvmlInventory()
    stack.push_async_callback(inventory.close)
    await inventory.start()
    layers = OverlayLayerStore(
        None if settings.layer_carry is LayerTransferChoice.AUTO else LayerTransferMethod(settings.layer_carry.name),
        info.root_dir,
        local=_engine_is_local(settings),
        stall_seconds=settings.stall_timeout,
    )
    # One folder for each node: only the daemon of a node decides which snapshots no record of it names.
    kept_files = (settings.snapshot_dir or Path(info.root_dir, "gpudock", "snapshots")) / settings.node_name
    snapshots = OverlaySnapshotStore(
        str(kept_files),
        info.root_dir,
        local=_engine_is_local(settings),
        limits=Limits(settings.snapshot_max_entries),
        stall_seconds=settings.stall_timeout,
    )
    stack.push_async_callback(snapshots.close)
    # With an engine on another host, snapshots cannot be stored on this one; only the backups of revisions are.
    revision_backups = FolderRevisionBackupStore(
        kept_files if _engine_is_local(settings) else settings.state_dir / "history" / settings.node_name
    )
    host_paths = _host_paths(settings, _engine_namespace(settings))
    await _restore_host_paths(host_paths)
    state, engine = wrappers.store(store), wrappers.engine(docker)
    backends = _volume_backends(settings, info.root_dir)
    core = NodeCore(
        Ports(
            store=state,
            engine=engine,
            layers=wrappers.layers(layers),
            snapshots=wrappers.snapshots(snapshots),
            revision_backups=wrappers.revision_backups(revision_backups),
            host_paths=wrappers.host_paths(host_paths),
            backends=[wrappers.volumes(backend) for backend in backends],
            copier=wrappers.copier(MirrorVolumeCopier(backends, settings.stall_timeout)),
        ),
        _node_policy(settings),
        Allocator(
            store=state,
            inventory=inventory,
            probe=HostPortProbe(),
            host=settings.host_id,
            port_range=port_range,
            pinned_ranges=[(ports.first, ports.last) for ports in settings.pinned_port_ranges],
        ),
        HostCapacity(cpus=info.cpus, memory_bytes=info.memory_bytes),
        recovering=True,
    )
    await _attach_volumes(settings)
    await check_versions()
    execs = ExecSessions(
        engine,
        core.container_resource,
        HostProcessControl(),
        hangup_grace=settings.exec_hangup_grace,
        limit=settings.max_execs,
    )
    watches = Watches(state, checkpoint_seconds=settings.watch_checkpoint_interval)
    drift = DriftTracker()
    nodes = Nodes(
        store=state,
        engine=engine,
        layers=core.ports.layers,
        inventory=inventory,
        host_usage=LocalHostUsage(),
        claims=core.claims,
        backends=core.backends,
        version=VERSION,
        start_time=start_time,
        port_range=port_range,
    )
    server = build_server(
        Services(
            containers=core.containers,
            volumes=core.volumes,
            operations=core.operations,
            execs=execs,
            nodes=nodes,
            watches=watches,
            drift=drift,
        ),
        settings,
    )
    return daemon.Daemon(
        settings=settings,
        version=VERSION,
        store=state,
        engine=engine,
        operations=core.operations,
        execs=execs,
        watches=watches,
        reconciler=core.reconciler(
            drift,
            interval=settings.reconcile_interval,
            orphan_grace=settings.orphan_grace,
            start_retry_delays=(settings.start_retry_pause, settings.start_retry_pause_max),
        ),
        retention=core.retention(settings.reconcile_interval),
        server=server,
        registered=lease.registered,
    )


def _node_policy(settings: Settings) -> NodePolicy:
    backend = settings.volume_backend
    return NodePolicy(
        node=settings.node_name,
        host=settings.host_id,
        stop_seconds=settings.stop_timeout,
        settle_seconds=settings.settle_period,
        start_watch_seconds=settings.start_watch_period,
        pool_path=str(settings.volume_root),
        forced_backend=None if backend is VolumeBackendChoice.AUTO else VolumeBackendKind(backend.name),
        overcommit=settings.volume_overcommit,
        history=HistoryDefaults(
            snapshots=SnapshotPolicy(settings.snapshot_policy.name),
            keep_revisions=settings.keep_revisions,
            keep_seconds=settings.keep_revisions_for,
            on_stop=settings.snapshot_on_stop,
        ),
        adoption=AdoptionRules(settings.adoptable_volumes),
        images=ImagePolicy(
            replace_any=settings.commit_replace is CommitReplace.ANY,
            repositories=settings.commit_repositories,
            verify_access=settings.verify_image_access,
            pull_stall_seconds=settings.pull_stall_timeout,
        ),
        limits=_node_limits(settings),
    )


def attach_volumes(settings: Settings) -> int:
    """Attach the volumes with a size and bind the host paths; returns the exit code of the process.

    The engine need not run: this is done at boot, before it starts.
    """
    configure(settings.log_format, settings.log_level)
    return asyncio.run(_attach(settings))


async def _attach(settings: Settings) -> int:
    problems = await _attach_volumes(settings)
    if _engine_is_local(settings):
        # In the mount namespace of this process: that of the engine is found by its process, which does not run yet.
        problems += await _restore_host_paths(_host_paths(settings, MountNamespace()))
    return 1 if problems else 0


async def _attach_volumes(settings: Settings) -> int:
    """Attach all volumes; returns how many failed. Only the containers that mount a failed volume do not start."""
    if not _engine_is_local(settings):
        return 0
    problems = await attach_all_volumes(settings.volume_root)
    for problem in problems:
        log.error("volume not attached", uid=problem.uid, detail=problem.detail)
    return len(problems)


def _node_limits(settings: Settings) -> NodeLimits:
    return NodeLimits(
        max_memory_bytes=settings.max_memory,
        max_pids=settings.max_pids_limit,
        default_pids=settings.default_pids_limit,
    )


def _host_paths(settings: Settings, namespace: MountNamespace | None) -> HostPathBinder:
    return HostPathBinder(settings.state_dir, [str(path) for path in settings.allowed_host_paths], namespace)


def _engine_namespace(settings: Settings) -> MountNamespace | None:
    return MountNamespace(settings.docker_host.removeprefix("unix://")) if _engine_is_local(settings) else None


async def _restore_host_paths(host_paths: HostPathBinder) -> int:
    """Bind the recorded host paths; returns how many failed. Engine containers that mount a failed one do not start."""
    problems = await host_paths.restore()
    for problem in problems:
        log.error(
            "host path not bound",
            engine_container=problem.engine_container,
            host_path=problem.host_path,
            detail=problem.detail,
        )
    return len(problems)


def _engine_is_local(settings: Settings) -> bool:
    return settings.docker_host.startswith("unix:")


def _volume_backends(settings: Settings, engine_root: str) -> tuple[ProjectQuotaBackend, LoopBackend, PlainBackend]:
    root, local = settings.volume_root, _engine_is_local(settings)
    filesystem = "" if settings.volume_filesystem is VolumeFilesystem.AUTO else settings.volume_filesystem.value
    return (
        ProjectQuotaBackend(root, local=local),
        LoopBackend(root, local=local, filesystem=filesystem),
        PlainBackend(Path(engine_root)),
    )


async def _open_etcd(settings: Settings, stack: AsyncExitStack) -> EtcdConnection:
    if settings.etcd_endpoints:
        address = _etcd_address(settings)
    else:
        embedded = EmbeddedEtcd(
            settings.state_dir,
            quota_bytes=settings.etcd_quota,
            allow_inconsistent=settings.allow_inconsistent_etcd,
        )
        await embedded.start()
        stack.push_async_callback(embedded.close)
        address = embedded.address
    connection = EtcdConnection(address)
    await connection.open()
    stack.push_async_callback(connection.close)
    return connection


def _etcd_address(settings: Settings) -> EtcdAddress:
    tls = (
        EtcdTls(ca=settings.etcd_ca, certificate=settings.etcd_cert, key=settings.etcd_key)
        if settings.etcd_tls
        else None
    )
    if settings.etcd_key is not None:
        require_private(settings.etcd_key, "etcd_key")
    password = ""
    if settings.etcd_password_file is not None:
        content, _ = read_private(settings.etcd_password_file, "etcd_password_file")
        try:
            password = content.decode().strip()
        except UnicodeDecodeError as error:
            raise StartupError(
                f"etcd_password_file {settings.etcd_password_file} is not UTF-8: {error}", "correct the file"
            ) from error
    return EtcdAddress(tuple(settings.etcd_endpoints), tls=tls, user=settings.etcd_user, password=password)


async def _open_store(settings: Settings, connection: EtcdConnection, stack: AsyncExitStack) -> EtcdStore:
    store = EtcdStore(
        connection,
        prefix=settings.etcd_prefix,
        retention=timedelta(seconds=settings.operation_retention),
        deadline=timedelta(seconds=settings.store_timeout),
        idle=timedelta(seconds=settings.watch_checkpoint_interval / 2),
        quota_bytes=0 if settings.etcd_endpoints else settings.etcd_quota,
    )
    stack.push_async_callback(store.close)
    await store.start_maintenance()
    await store.open()
    return store


async def _open_engine(settings: Settings, stack: AsyncExitStack) -> DockerEngine:
    try:
        engine = await DockerEngine.connect(
            settings.docker_host,
            tls=settings.docker_tls_dir,
            timeout=settings.engine_timeout,
            scratch_dir=settings.state_dir,
            defaults=ContainerDefaults(
                limits=_node_limits(settings),
                drop_net_raw=settings.drop_net_raw,
                no_new_privileges=settings.no_new_privileges,
                allowed_nvidia_switches=frozenset(settings.allowed_nvidia_switches),
            ),
        )
    except (EngineUnavailable, EngineRejected, ValueError) as error:
        raise StartupError(
            f"cannot use the Docker Engine at {settings.docker_host}: {error}",
            "check that it runs, that this user can open its socket, and the setting docker_host",
        ) from error
    stack.push_async_callback(engine.close)
    return engine


async def _check_port_range(settings: Settings, store: Store) -> None:
    """Raise StartupError if other programs have every TCP port of port_range. Ports of containers do not count."""
    claimed = (await store.claims(settings.host_id)).claims
    probe, ports = HostPortProbe(), settings.port_range
    for port in range(ports.first, ports.last + 1):
        if PortKey(Protocol.TCP, port) in claimed or await probe(Protocol.TCP.value, port):
            return
    raise StartupError(
        f"no free TCP port in port_range {ports}: other programs listen on all of them",
        "list the programs with `ss -ltnp` and stop them, or choose another --port-range",
    )


async def _register(
    settings: Settings,
    connection: EtcdConnection,
    store: EtcdStore,
    engine_id: str,
    stack: AsyncExitStack,
    *,
    lost: Callable[[NodeTaken], None],
) -> NodeLease:
    process = this_process()
    record = NodeRecord(
        node=settings.node_name,
        host=settings.host_id,
        address=settings.advertise_address or next(iter(settings.listen), ""),
        version=VERSION,
        engine_id=engine_id,
        boot_id=process.boot_id,
        pid=process.pid,
        start_ticks=process.start_ticks,
        start_time=now(),
    )
    lease = NodeLease(
        connection, record, on_lost=lost, ttl=_NODE_LEASE, prefix=settings.etcd_prefix, capacity=store.capacity
    )
    stack.push_async_callback(lease.close)
    await lease.register()
    return lease
