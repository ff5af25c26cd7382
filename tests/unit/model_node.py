"""The use cases on a host in memory, with a summary of its state that tests compare."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field, replace
from typing import Any

from gpudock_server.core.assembly import NodeCore, NodePolicy, Ports
from gpudock_server.core.containers.commands import Command, Create
from gpudock_server.core.operations.engine import RequestKey
from gpudock_server.core.placement.allocator import Allocator
from gpudock_server.core.reconcile.images import remove_unused_images
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.model.container import Container
from gpudock_server.model.engine import EngineContainer, HostCapacity
from gpudock_server.model.operation import Operation
from gpudock_server.model.spec import ContainerSpec, GpuRequest, PortRequest
from gpudock_server.model.volume import Volume

from tests.rig.patience import limit
from tests.rpc.fake_layers import FakeRevisionBackups
from tests.rpc.fakes import FakeInventory, every_port_is_free
from tests.unit.failing_store import FailingStore
from tests.unit.faults import Faults
from tests.unit.model_engine import IMAGE, ModelEngine
from tests.unit.model_files import (
    ModelCopier,
    ModelHostPaths,
    ModelLayers,
    ModelPlainVolumes,
    ModelSnapshots,
    ModelVolumes,
)

HOST, NODE = "host1", "gpu1"
SPEC = ContainerSpec(image=IMAGE, gpus=GpuRequest(count=2), ports=(PortRequest(container_port=80),))
# Limits waits that need no time at all, so that a test that would hang fails.
TIMEOUT_SECONDS = 30.0


@dataclass
class ModelNode:
    """A node with one daemon process. `restart_daemon` replaces the process; host and store stay."""

    faults: Faults = field(default_factory=Faults)
    store: FailingStore = field(default_factory=FailingStore)

    def __post_init__(self) -> None:
        # Of the last `run`.
        self.last_operation_id = ""
        self.engine = ModelEngine(self.faults)
        self.layers = ModelLayers(self.engine)
        self.snapshots = ModelSnapshots(self.engine)
        self.host_paths = ModelHostPaths(self.faults)
        self.sized_volumes = ModelVolumes(faults=self.faults, engine=self.engine)
        self.unsized_volumes = ModelPlainVolumes(faults=self.faults, engine=self.engine)
        self.copier = ModelCopier(self.sized_volumes)
        self.revision_backups = FakeRevisionBackups()
        self.policy = NodePolicy(
            node=NODE, host=HOST, stop_seconds=10, settle_seconds=3, start_watch_seconds=2, pool_path="/volumes"
        )
        self.start_daemon()

    def start_daemon(self, *, recovering: bool = False) -> None:
        """Begin a process of the daemon, with `self.policy`."""
        ports = Ports(
            store=self.store,
            engine=self.engine,
            layers=self.layers,
            snapshots=self.snapshots,
            revision_backups=self.revision_backups,
            host_paths=self.host_paths,
            backends=[self.sized_volumes, self.unsized_volumes],
            copier=self.copier,
        )
        allocator = Allocator(
            store=self.store,
            inventory=FakeInventory(),
            probe=every_port_is_free,
            host=HOST,
            port_range=(20000, 20009),
        )
        self.core = NodeCore(ports, self.policy, allocator, HostCapacity(), recovering=recovering)
        self.operations = self.core.operations
        self.containers, self.volumes = self.core.containers, self.core.volumes

    def configure(self, **changes: Any) -> None:
        """Begin a process with these settings; the names are those of NodePolicy."""
        self.policy = replace(self.policy, **changes)
        self.start_daemon()

    def configure_history(self, **changes: Any) -> None:
        """Begin a process with these settings of the history; the names are those of HistoryDefaults."""
        self.configure(history=replace(self.policy.history, **changes))

    async def restart_daemon(self) -> None:
        """End the process, and have a new one resume its operations."""
        await self.operations.drain(0)
        self.start_daemon()
        await self.operations.wait_until_ended(await self.operations.resume())
        await remove_unused_images(self.store, self.engine, self.core.images)

    async def begin(self, command: Command | volume_commands.Command, request: RequestKey | None = None) -> str:
        """Begin a command; return the id of its operation."""
        if isinstance(command, volume_commands.Command):
            return await self.volumes.begin(command, request)
        return await self.containers.begin(command, request)

    async def run(self, command: Command | volume_commands.Command) -> Operation:
        """Run a command until its operation ends, with or without success; return the record of the operation."""
        self.last_operation_id = await self.begin(command)
        return await self.ended_operation(self.last_operation_id)

    async def ended_operation(self, operation_id: str) -> Operation:
        """Wait for the end of an operation; return its record."""
        async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
            await self.operations.wait_until_ended([operation_id])
        return self.store.journal[operation_id].value

    async def run_ok(self, command: Command | volume_commands.Command) -> Operation:
        """Run a command, and fail unless its operation succeeds without a message."""
        operation = await self.run(command)
        assert operation.error is None, operation.error
        assert operation.message == ""
        return operation

    async def create_container(self, name: str = "a", spec: ContainerSpec = SPEC, **fields: Any) -> Container:
        """Create a container that runs and has written a file."""
        await self.run_ok(Create(name=name, spec=spec, **fields))
        self.engine.write(self.engine_id(name), f"by {name}")
        return self.container(name)

    def container(self, name: str = "a") -> Container:
        """Return the record of a container."""
        return self.store.container_records[name].value

    def volume(self, name: str = "data") -> Volume:
        """Return the record of a volume."""
        return self.store.volume_records[name].value

    def engine_id(self, name: str = "a") -> str:
        """Return the id of the engine container of a container."""
        engine = self.container(name).engine
        assert engine is not None
        return engine.engine_id

    def engine_container(self, name: str = "a") -> EngineContainer:
        """Return the engine container of a container."""
        return self.engine.containers[self.engine_id(name)]

    def files(self, name: str = "a") -> frozenset[str]:
        """Return the files of a container."""
        return self.engine.files(self.engine_id(name))

    def claims(self, name: str = "a") -> list[str]:
        """Return the keys of the claims of a container."""
        uid = self.container(name).uid
        return sorted(str(key) for key, holder in self.store.holders[HOST].items() if holder.uid == uid)

    def summary(self) -> dict[str, object]:
        """Return the state of host and store; equal for two nodes on which the same was done.

        Generated ids are replaced by placeholders.
        """
        engine, store = self.engine, self.store
        names: dict[str, str] = {}
        for number, operation_id in enumerate(store.journal):
            names[operation_id] = f"<{number}>"
            names[operation_id[-8:]] = f"<{number}>"
        for name, record in store.container_records.items():
            names[record.value.uid] = f"<uid of {name}>"
        for name, volume in store.volume_records.items():
            names[volume.value.uid] = f"<uid of {name}>"
        pattern = re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "$^")

        def plain(text: object) -> str:
            known = pattern.sub(lambda found: names[found.group()], str(text))
            return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|sha256:\d+|layer \d+|engine\d+|anonymous\d+", "<new>", known)

        records: dict[str, object] = {}
        for name, stored in sorted(store.container_records.items()):
            container = stored.value
            status, binding = container.status, container.engine
            records[name] = (
                container.spec,
                container.revision,
                container.owner,
                status.state,
                status.placement,
                status.holds_resources,
                status.exit_code,
                status.message,
                binding.placement if binding else None,
                plain(binding.layer_images) if binding else "",
                binding.base_depth if binding else 0,
                plain(binding.base_image_id) if binding else "",
            )
        bound = {
            stored.value.engine.engine_id: name
            for name, stored in store.container_records.items()
            if stored.value.engine
        }
        containers = sorted(
            (
                bound.get(shown.id, f"orphan {plain(shown.name)}"),
                shown.state.value,
                sorted(map(plain, engine.files(shown.id))),
                shown.gpu_uuids,
                shown.ports,
                (shown.cpus, shown.memory_bytes, shown.pids_limit),
                {target: plain(name) for target, name in shown.volumes.items()},
            )
            for shown in engine.containers.values()
        )
        return {
            "records": records,
            "engine containers": containers,
            "claims": sorted(
                (str(key), holder.container, holder.operation_id) for key, holder in store.holders[HOST].items()
            ),
            # A pulled image stays, even if its operation fails.
            "tags": sorted(
                (plain(name), sorted(engine.images[image].files))
                for name, image in engine.tags.items()
                if name not in engine.registry
            ),
            "images": len(engine.images.keys() - {image.id for image in engine.registry.values()}),
            "engine volumes": sorted(map(plain, engine.volumes)),
            "snapshots": sorted(
                (plain(key.uid), key.revision, sorted(snapshot.files))
                for key, snapshot in self.snapshots.sealed_snapshots.items()
            ),
            "partial snapshots": sorted(map(str, self.snapshots.partial)),
            "revisions": sorted(
                (plain(uid), number, view.revision.cause.value, view.snapshot is not None, view.snapshot_warning)
                for (uid, number), view in store.revision_views.items()
            ),
            "bound": sorted((plain(name), sorted(paths)) for name, paths in self.host_paths.bound.items()),
            "volumes": {
                name: (stored.value.state, stored.value.size_bytes, stored.value.reserved_bytes, stored.value.revision)
                for name, stored in sorted(store.volume_records.items())
            },
            "stores": sorted(
                (plain(uid), content)
                for uid, content in (self.sized_volumes.stores | self.unsized_volumes.stores).items()
            ),
            "locks": sorted(map(str, store.locks)),
        }

    def check_consistency(self) -> None:
        """Fail unless the store is consistent while no operation runs."""
        assert not self.store.locks
        assert not self.snapshots.partial
        for holder in self.store.holders[HOST].values():
            assert not holder.operation_id, "the operation has ended, and its claim still names it"
            assert holder.container in self.store.container_records
        for name, stored in self.store.container_records.items():
            placement = stored.value.status.placement
            assert len(self.claims(name)) == len(placement.gpu_uuids) + len(placement.ports)
