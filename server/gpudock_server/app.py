"""The composition root: the only file that knows every other.

Components are opened in the order in which they need each other and closed in the reverse, by one exit stack. SIGTERM
and SIGINT drain: nothing new begins, operations reach a recorded step, streams end with SHUTTING_DOWN. A second signal
ends the process at once; whatever it was doing is taken up by the next start. SIGUSR1 shows where everything stands.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import structlog

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
from gpudock_server.core.adoption_rules import AdoptionRules
from gpudock_server.core.containers import Containers, HistoryDefaults, ImagePolicy, World
from gpudock_server.core.containers.retention import Retention
from gpudock_server.core.exec.sessions import ExecSessions
from gpudock_server.core.nodes import Nodes
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.placement.allocator import Allocator
from gpudock_server.core.reconcile import DriftTracker, Reconciler
from gpudock_server.core.saga_factory import saga_factory
from gpudock_server.core.volumes import Storage, Volumes
from gpudock_server.core.watches import Watches
from gpudock_server.errors import EngineRejected, EngineUnavailable, GpudockError, StoreFull, StoreUnavailable
from gpudock_server.logs import configure
from gpudock_server.memory import set_malloc_thresholds
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
from gpudock_server.rpc.listeners import listen
from gpudock_server.rpc.server import RpcServer, Services, build_server
from gpudock_server.settings.definitions import (
    CommitReplace,
    LayerTransferChoice,
    Settings,
    VolumeBackendChoice,
    VolumeFilesystem,
)
from gpudock_server.startup import StartupError
from gpudock_server.task_dump import dump_on_sigusr1

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

VERSION = version("gpudock")
T = TypeVar("T")

_HEALTH_INTERVAL_SECONDS = 2.0
# What has not answered by then is out of reach as far as health goes, however patient other calls are.
_HEALTH_TIMEOUT_SECONDS = 3.0
# Of the time to shut down, what is kept for telling those who watch; a quarter of it where it is short.
_WATCHER_NOTIFY_SECONDS = 1.0
# How long changes wait for operations of the daemon before that take time, such as a stop. After that these go on under
# their locks.
_RECOVERY_SECONDS = 5.0
_NODE_LEASE = timedelta(seconds=10)


def _same_engine(engine: Engine) -> Engine:
    return engine


def _same_store(store: Store) -> Store:
    return store


def _same_layers(layers: LayerStore) -> LayerStore:
    return layers


def _same_snapshots(snapshots: SnapshotStore) -> SnapshotStore:
    return snapshots


def _same_host_paths(host_paths: HostPaths) -> HostPaths:
    return host_paths


def _same_ledger(ledger: RevisionBackupStore) -> RevisionBackupStore:
    return ledger


def _same_volumes(backend: VolumeBackend) -> VolumeBackend:
    return backend


def _same_copier(copier: VolumeCopier) -> VolumeCopier:
    return copier


@dataclass(frozen=True, slots=True)
class PortWrappers:
    """What fault tests put between core and the ports. Production passes none."""

    engine: Callable[[Engine], Engine] = _same_engine
    store: Callable[[Store], Store] = _same_store
    layers: Callable[[LayerStore], LayerStore] = _same_layers
    snapshots: Callable[[SnapshotStore], SnapshotStore] = _same_snapshots
    host_paths: Callable[[HostPaths], HostPaths] = _same_host_paths
    ledger: Callable[[RevisionBackupStore], RevisionBackupStore] = _same_ledger
    volumes: Callable[[VolumeBackend], VolumeBackend] = _same_volumes
    copier: Callable[[VolumeCopier], VolumeCopier] = _same_copier


def run(settings: Settings, wrappers: PortWrappers | None = None) -> int:
    """Serve until told to stop; the process's exit code. Raises StartupError for what an operator must mend."""
    configure(settings.log_format, settings.log_level)
    set_malloc_thresholds()
    return asyncio.run(_serve(settings, wrappers or PortWrappers()))


async def _serve(settings: Settings, wrappers: PortWrappers) -> int:
    stop = _Shutdown()
    stop.listen()
    dump_on_sigusr1()
    async with AsyncExitStack() as stack:
        try:
            daemon = await stop.run_until_stopped(_assemble(settings, wrappers, stack, stop))
            if daemon is not None:
                await daemon.serve(stop)
        except EngineUnavailable as error:
            raise StartupError(
                f"the Docker Engine at {settings.docker_host} stopped answering: {error.detail}",
                "is it being restarted?",
            ) from error
        except StoreUnavailable as error:
            raise _etcd_startup_error(settings, error) from error
    log.info("stopped", exit_code=stop.exit_code)
    return stop.exit_code


@dataclass(slots=True)
class _Shutdown:
    """That the daemon is to stop, and whether it is a failure that it does."""

    told: asyncio.Event = field(default_factory=asyncio.Event)
    exit_code: int = 0

    def listen(self) -> None:
        """Set at the first SIGTERM or SIGINT; the second ends the process where it stands."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.told.is_set():
            log.warning("told to stop twice; stopping at once")
            os._exit(1)
        self.told.set()

    def fail(self) -> None:
        """Stop, for a reason that a supervisor is to notice."""
        self.exit_code = 1
        self.told.set()

    def on_node_taken_over(self, taken: NodeTaken) -> None:
        """Stop: two daemons must never drive one node's operations. They are left at their recorded steps."""
        log.critical("the node was taken over; stopping", detail=str(taken))
        self.fail()

    async def run_until_stopped(self, work: Awaitable[T]) -> T | None:
        """What `work` gives; it is cancelled, and None given, once the daemon is to stop."""
        working = asyncio.ensure_future(work)
        telling = asyncio.create_task(self.told.wait())
        try:
            await asyncio.wait((working, telling), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                return None
            return working.result()
        finally:
            working.cancel()
            telling.cancel()


async def _assemble(settings: Settings, wrappers: PortWrappers, stack: AsyncExitStack, stop: _Shutdown) -> _Daemon:
    make_private_folder(settings.state_dir)
    start_time = now()
    port_range = (settings.port_range.first, settings.port_range.last)
    docker = await _open_engine(settings, stack)
    info = await docker.info()
    connection = await _open_etcd(settings, stack)
    store = await _open_store(settings, connection, stack)
    await _check_port_range(settings, store)
    lease = await _register(settings, connection, store, info.id, stack, lost=stop.on_node_taken_over)

    inventory = NvmlInventory()
    stack.push_async_callback(inventory.close)
    await inventory.start()
    layers = OverlayLayerStore(
        None if settings.layer_carry is LayerTransferChoice.AUTO else LayerTransferMethod(settings.layer_carry.name),
        info.root_dir,
        local=_engine_is_local(settings),
        stall_seconds=settings.stall_timeout,
    )
    # One folder for each node: what no record of a node's names is judged by its own daemon alone.
    kept_files = (settings.snapshot_dir or Path(info.root_dir, "gpudock", "snapshots")) / settings.node_name
    snapshots = OverlaySnapshotStore(
        str(kept_files),
        info.root_dir,
        local=_engine_is_local(settings),
        limits=Limits(settings.snapshot_max_entries),
        stall_seconds=settings.stall_timeout,
    )
    stack.push_async_callback(snapshots.close)
    # Of an engine on another host, no snapshot is kept here.
    ledger = FolderRevisionBackupStore(
        kept_files if _engine_is_local(settings) else settings.state_dir / "history" / settings.node_name
    )
    host_paths = _host_paths(settings, _engine_namespace(settings))
    await _restore_host_paths(host_paths)
    state = wrappers.store(store)
    world = World(
        store=state,
        engine=wrappers.engine(docker),
        layers=wrappers.layers(layers),
        snapshots=wrappers.snapshots(snapshots),
        host_paths=wrappers.host_paths(host_paths),
        ledger=wrappers.ledger(ledger),
        adoption=AdoptionRules(settings.adoptable_volumes),
        allocator=Allocator(
            store=state,
            inventory=inventory,
            probe=HostPortProbe(),
            host=settings.host_id,
            port_range=port_range,
            pinned_ranges=[(ports.first, ports.last) for ports in settings.pinned_port_ranges],
        ),
        node=settings.node_name,
        host=settings.host_id,
        capacity=HostCapacity(cpus=info.cpus, memory_bytes=info.memory_bytes),
        settle_seconds=settings.settle_period,
        start_watch_seconds=settings.start_watch_period,
        stop_seconds=settings.stop_timeout,
        images=ImagePolicy(
            replace_any=settings.commit_replace is CommitReplace.ANY,
            repositories=settings.commit_repositories,
            verify_access=settings.verify_image_access,
            pull_stall_seconds=settings.pull_stall_timeout,
        ),
        history=HistoryDefaults(
            snapshots=SnapshotPolicy(settings.snapshot_policy.name),
            keep_revisions=settings.keep_revisions,
            keep_seconds=settings.keep_revisions_for,
            on_stop=settings.snapshot_on_stop,
        ),
        limits=_node_limits(settings),
    )
    await _attach_volumes(settings)
    await check_versions()
    storage = _storage(settings, world, info.root_dir, wrappers)
    operations = Operations(state, settings.node_name, saga_factory(world, storage), recovering=True)
    containers = Containers(world, operations)
    execs = ExecSessions(world, HostProcessControl(), hangup_grace=settings.exec_hangup_grace, limit=settings.max_execs)
    watches = Watches(state, checkpoint_seconds=settings.watch_checkpoint_interval)
    drift = DriftTracker()
    server = build_server(
        Services(
            containers=containers,
            volumes=Volumes(storage, operations),
            operations=operations,
            execs=execs,
            nodes=Nodes(world, storage, inventory, version=VERSION, start_time=start_time, port_range=port_range),
            watches=watches,
            drift=drift,
        ),
        settings,
    )
    return _Daemon(
        settings=settings,
        world=world,
        operations=operations,
        execs=execs,
        watches=watches,
        reconciler=Reconciler(
            storage,
            operations,
            drift,
            interval=settings.reconcile_interval,
            orphan_grace=settings.orphan_grace,
            start_retry_delays=(settings.start_retry_pause, settings.start_retry_pause_max),
        ),
        retention=Retention(world, containers, interval=settings.reconcile_interval),
        server=server,
        registered=lease.registered,
    )


def attach_volumes(settings: Settings) -> int:
    """Make ready for the engine, which need not run, volumes with a size and host paths; the process's exit code."""
    configure(settings.log_format, settings.log_level)
    return asyncio.run(_attach(settings))


async def _attach(settings: Settings) -> int:
    problems = await _attach_volumes(settings)
    if _engine_is_local(settings):
        # In this process's own mount namespace: the engine, by which another one would be found, does not run yet.
        problems += await _restore_host_paths(_host_paths(settings, MountNamespace()))
    return 1 if problems else 0


async def _attach_volumes(settings: Settings) -> int:
    """How many could not be made ready. What mounts one of those does not start, and all others do."""
    if not _engine_is_local(settings):
        return 0
    problems = await attach_all_volumes(settings.volume_root)
    for problem in problems:
        log.error("a volume could not be made ready", uid=problem.uid, detail=problem.detail)
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
    """How many could not be bound again. The engine containers that mount one of those do not start."""
    problems = await host_paths.restore()
    for problem in problems:
        log.error(
            "a host path could not be bound",
            engine_container=problem.engine_container,
            host_path=problem.host_path,
            detail=problem.detail,
        )
    return len(problems)


def _engine_is_local(settings: Settings) -> bool:
    return settings.docker_host.startswith("unix:")


def _storage(settings: Settings, world: World, engine_root: str, wrappers: PortWrappers) -> Storage:
    root, local = settings.volume_root, _engine_is_local(settings)
    filesystem = "" if settings.volume_filesystem is VolumeFilesystem.AUTO else settings.volume_filesystem.value
    backends = (
        ProjectQuotaBackend(root, local=local),
        LoopBackend(root, local=local, filesystem=filesystem),
        PlainBackend(Path(engine_root)),
    )
    chosen = settings.volume_backend
    return Storage(
        world=world,
        backends=[wrappers.volumes(backend) for backend in backends],
        copier=wrappers.copier(MirrorVolumeCopier(backends, settings.stall_timeout)),
        path=str(root),
        forced=None if chosen is VolumeBackendChoice.AUTO else VolumeBackendKind(chosen.name),
        overcommit=settings.volume_overcommit,
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
                f"etcd_password_file {settings.etcd_password_file} cannot be read: {error}", "change etcd_password_file"
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


def _etcd_startup_error(settings: Settings, error: StoreUnavailable) -> StartupError:
    if not settings.etcd_endpoints:
        return StartupError(
            f"the etcd in {settings.state_dir} does not answer: {error.detail}", "its own lines above say more"
        )
    return StartupError(
        f"etcd at {', '.join(settings.etcd_endpoints)} does not answer: {error.detail}",
        "start it, or correct etcd_endpoints; without etcd_endpoints gpudockd runs an etcd of its own",
    )


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
            f"the Docker Engine at {settings.docker_host} cannot be used: {error}",
            "is it running, may this user open its socket, and is docker_host right?",
        ) from error
    stack.push_async_callback(engine.close)
    return engine


async def _check_port_range(settings: Settings, store: Store) -> None:
    """Refuse a range of which containers could never get a port; one that they use up already is as it should be."""
    claimed = (await store.claims(settings.host_id)).claims
    probe, ports = HostPortProbe(), settings.port_range
    for port in range(ports.first, ports.last + 1):
        if PortKey(Protocol.TCP, port) in claimed or await probe(Protocol.TCP.value, port):
            return
    raise StartupError(
        f"port_range {ports} is taken: other programs have every TCP port of it",
        "`ss -ltnp` shows which; stop them, or choose another --port-range",
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


@dataclass(frozen=True, slots=True)
class _Daemon:
    """The assembled parts, and their life."""

    settings: Settings
    world: World
    operations: Operations
    execs: ExecSessions
    watches: Watches
    reconciler: Reconciler
    retention: Retention
    server: RpcServer
    registered: asyncio.Event

    async def recover(self) -> tuple[str, ...]:
        """Resume what the daemon before left, compare records and engine, then take changes.

        Returns the operations that go on meanwhile, such as one whose image is being pulled.
        """
        resumed = await self.reconciler.recover()
        try:
            async with asyncio.timeout(_RECOVERY_SECONDS):
                await self.operations.wait_until_ended_or_interruptible(resumed)
        except TimeoutError:
            log.warning("recovery goes on while serving", operations=sorted(self.operations.active))
        await self.reconciler.full_pass()
        self.operations.set_recovery_blocked(None)
        self.operations.allow_new_operations()
        return tuple(operation_id for operation_id in resumed if operation_id in self.operations.active)

    async def _try_recover(self) -> tuple[str, ...] | None:
        """`recover`; None where the store has no room for it: it is to be repeated, and reads are served."""
        if not self.registered.is_set():
            full = (await self.world.store.usage()).full
            self._postpone_recovery(StoreFull(full or "it had no room for the name of this node"))
            return None
        try:
            return await self.recover()
        except StoreFull as error:
            self._postpone_recovery(error)
            return None

    def _postpone_recovery(self, error: StoreFull) -> None:
        log.warning("recovery waits for room in the store", detail=error.detail)
        self.operations.set_recovery_blocked(error)

    async def serve(self, stop: _Shutdown) -> None:
        """Answer reads, recover, take all calls until told to stop, then drain.

        Raises StartupError for a socket or an address that cannot be had, EngineUnavailable and StoreUnavailable where
        these go away before the recovery has ended.
        """
        # Before anything is driven: two daemons that were given one socket are a mistake in their settings.
        listeners = listen(self.server.grpc, self.settings)
        try:
            # A recovery may wait for an engine, and reads need not: they are answered while health is NOT_SERVING.
            await self.server.set_serving(False)
            await self.server.grpc.start()
            left = await stop.run_until_stopped(self._try_recover())
            if not stop.told.is_set():
                log.info("serving", node=self.settings.node_name, version=VERSION, addresses=listeners.addresses)
                await self._run_background_until_stopped(stop, left)
        finally:
            await self._drain()
            listeners.close()

    async def _run_background_until_stopped(self, stop: _Shutdown, left: Sequence[str] | None) -> None:
        watch = asyncio.create_task(self._run_background_tasks(left), name="watch engine and store")
        try:
            await stop.run_until_stopped(watch)
        except Exception:
            # Followed for as long as calls are taken; it ends by itself only by a defect.
            log.exception("no longer watching engine and store; stopping")
            stop.fail()

    async def _run_background_tasks(self, left: Sequence[str] | None) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reconcile(left))
            tasks.create_task(self._report_health())

    async def _reconcile(self, left: Sequence[str] | None) -> None:
        while left is None:
            await asyncio.sleep(_HEALTH_INTERVAL_SECONDS)
            try:
                left = await self._try_recover()
            except GpudockError as error:
                log.warning("recovery was broken off; it is tried again", detail=error.message)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.reconciler.pass_after(left))
            tasks.create_task(self.reconciler.run())
            tasks.create_task(self.retention.run())

    async def _report_health(self) -> None:
        trouble: str | None = None
        while True:
            before, trouble = trouble, await self._health_problem()
            await self.server.set_serving(not trouble)
            if trouble != before and (trouble or before):
                log.warning("not serving" if trouble else "serving again", detail=trouble)
            await asyncio.sleep(_HEALTH_INTERVAL_SECONDS)

    async def _health_problem(self) -> str:
        """What keeps this daemon from serving; empty if nothing does."""
        found = await asyncio.gather(
            _health_error("etcd", self.world.store.ping()), _health_error("the engine", self.world.engine.info())
        )
        return "; ".join(filter(None, found))

    async def _drain(self) -> None:
        log.info("draining", operations=len(self.operations.active))
        await self.server.set_serving(False)
        self.watches.drain()
        loop = asyncio.get_running_loop()
        grace = self.settings.shutdown_grace
        deadline = loop.time() + grace
        # Watchers are told how it ended when the work has ended, so the work gets a little less time than they do.
        working = grace - min(_WATCHER_NOTIFY_SECONDS, grace / 4)
        await asyncio.gather(self.operations.drain(working), _run_with_timeout(working, self.execs.drain()))
        await self.server.grpc.stop(max(0.0, deadline - loop.time()))


async def _health_error(what: str, call: Awaitable[object]) -> str:
    """Empty if `call` is answered in time, else what is wrong."""
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_SECONDS):
            await call
    except TimeoutError:
        return f"{what} has not answered within {_HEALTH_TIMEOUT_SECONDS:g} s"
    except GpudockError as error:
        return error.message
    return ""


async def _run_with_timeout(seconds: float, work: Awaitable[None]) -> None:
    """Do `work`, and leave it when its time is over."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        log.warning("commands were left running", after_seconds=seconds)
