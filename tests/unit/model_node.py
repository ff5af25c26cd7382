"""The use cases over a host in memory, and what is there after each of them, in words that tests can compare."""

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
from tests.unit.model_files import ModelCopier, ModelHostPaths, ModelLayers, ModelPlain, ModelSnapshots, ModelVolumes

HOST, NODE = "host1", "gpu1"
SPEC = ContainerSpec(image=IMAGE, gpus=GpuRequest(count=2), ports=(PortRequest(container_port=80),))
# Seconds for what takes none.
TIMEOUT_SECONDS = 30.0


@dataclass
class ModelNode:
    """One node. `restart` is what a new daemon process is: the same host and store, and nothing remembered."""

    faults: Faults = field(default_factory=Faults)
    store: FailingStore = field(default_factory=FailingStore)

    def __post_init__(self) -> None:
        # The operation that was asked for last.
        self.last_operation_id = ""
        self.engine = ModelEngine(self.faults)
        self.layers = ModelLayers(self.engine)
        self.snapshots = ModelSnapshots(self.engine)
        self.host_paths = ModelHostPaths(self.faults)
        self.sized_volumes = ModelVolumes(faults=self.faults, engine=self.engine)
        self.unsized_volumes = ModelPlain(faults=self.faults, engine=self.engine)
        self.copier = ModelCopier(self.sized_volumes)
        self.revision_backups = FakeRevisionBackups()
        self.policy = NodePolicy(
            node=NODE, host=HOST, stop_seconds=10, settle_seconds=3, start_watch_seconds=2, pool_path="/volumes"
        )
        self.start_daemon()

    def start_daemon(self, *, recovering: bool = False) -> None:
        """A process of the daemon, with `self.policy`."""
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
        """Other settings, by their names in NodePolicy."""
        self.policy = replace(self.policy, **changes)
        self.start_daemon()

    def configure_history(self, **changes: Any) -> None:
        """Other settings of the history, by their names in HistoryDefaults."""
        self.configure(history=replace(self.policy.history, **changes))

    async def restart_daemon(self) -> None:
        """Another process takes up what this one has left."""
        await self.operations.drain(0)
        self.start_daemon()
        await self.operations.wait_until_ended(await self.operations.resume())
        await remove_unused_images(self.store, self.engine, self.core.images)

    async def begin(self, command: Command | volume_commands.Command, request: RequestKey | None = None) -> str:
        """Begin what is asked for; the id of its operation."""
        if isinstance(command, volume_commands.Command):
            return await self.volumes.begin(command, request)
        return await self.containers.begin(command, request)

    async def run(self, command: Command | volume_commands.Command) -> Operation:
        """Bring what is asked for to its end, whatever that is; the record of its operation."""
        self.last_operation_id = await self.begin(command)
        return await self.ended_operation(self.last_operation_id)

    async def ended_operation(self, operation_id: str) -> Operation:
        """Wait for the end of an operation; its record."""
        async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
            await self.operations.wait_until_ended([operation_id])
        return self.store.journal[operation_id].value

    async def run_ok(self, command: Command | volume_commands.Command) -> Operation:
        """Bring what is asked for to a good end."""
        operation = await self.run(command)
        assert operation.error is None, operation.error
        assert operation.message == ""
        return operation

    async def create_container(self, name: str = "a", spec: ContainerSpec = SPEC, **fields: Any) -> Container:
        """A container that has written a file of its name."""
        await self.run_ok(Create(name=name, spec=spec, **fields))
        self.engine.write(self.engine_id(name), f"by {name}")
        return self.container(name)

    def container(self, name: str = "a") -> Container:
        """A container's record."""
        return self.store.container_records[name].value

    def volume(self, name: str = "data") -> Volume:
        """A volume's record."""
        return self.store.volume_records[name].value

    def engine_id(self, name: str = "a") -> str:
        """What serves a container."""
        engine = self.container(name).engine
        assert engine is not None
        return engine.engine_id

    def engine_container(self, name: str = "a") -> EngineContainer:
        """What serves a container, as the engine shows it."""
        return self.engine.containers[self.engine_id(name)]

    def files(self, name: str = "a") -> frozenset[str]:
        """The files that a container has."""
        return self.engine.files(self.engine_id(name))

    def claims(self, name: str = "a") -> list[str]:
        """What a container has claimed."""
        uid = self.container(name).uid
        return sorted(str(key) for key, holder in self.store.holders[HOST].items() if holder.uid == uid)

    # -- what is there -----------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, object]:
        """All that is there, the same for two hosts on which the same was done."""
        engine, store = self.engine, self.store
        names: dict[str, str] = {}
        for number, operation_id in enumerate(store.journal):
            names[operation_id] = f"<{number}>"
            names[operation_id[-8:]] = f"<{number}>"
        for name, head in store.container_records.items():
            names[head.value.uid] = f"<uid of {name}>"
        for name, volume in store.volume_records.items():
            names[volume.value.uid] = f"<uid of {name}>"
        pattern = re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "$^")

        def plain(text: object) -> str:
            known = pattern.sub(lambda found: names[found.group()], str(text))
            return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|sha256:\d+|layer \d+|engine\d+|anonymous\d+", "<new>", known)

        heads: dict[str, object] = {}
        for name, stored in sorted(store.container_records.items()):
            one = stored.value
            status = one.status
            heads[name] = (
                one.spec,
                one.revision,
                one.owner,
                status.state,
                status.placement,
                status.holds_resources,
                status.exit_code,
                status.message,
                one.engine.placement if one.engine else None,
                plain(one.engine.layer_images) if one.engine else "",
                one.engine.base_depth if one.engine else 0,
                plain(one.engine.base_image_id) if one.engine else "",
            )
        serving = {
            one.value.engine.engine_id: name for name, one in store.container_records.items() if one.value.engine
        }
        containers = sorted(
            (
                serving.get(one.id, f"stray {plain(one.name)}"),
                one.state.value,
                sorted(map(plain, engine.files(one.id))),
                one.gpu_uuids,
                one.ports,
                (one.cpus, one.memory_bytes, one.pids_limit),
                {target: plain(name) for target, name in one.volumes.items()},
            )
            for one in engine.containers.values()
        )
        return {
            "heads": heads,
            "containers": containers,
            "claims": sorted(
                (str(key), holder.container, holder.operation_id) for key, holder in store.holders[HOST].items()
            ),
            # What was pulled stays, whatever becomes of the operation that it was pulled for.
            "tags": sorted(
                (plain(name), sorted(engine.images[image].files))
                for name, image in engine.tags.items()
                if name not in engine.registry
            ),
            "images": len(engine.images.keys() - {image.id for image in engine.registry.values()}),
            "engine volumes": sorted(map(plain, engine.volumes)),
            "snapshots": sorted(
                (plain(key.uid), key.revision, sorted(one.files))
                for key, one in self.snapshots.sealed_snapshots.items()
            ),
            "partial snapshots": sorted(map(str, self.snapshots.partial)),
            "revisions": sorted(
                (plain(uid), number, view.revision.cause.value, view.snapshot is not None, view.snapshot_warning)
                for (uid, number), view in store.revision_views.items()
            ),
            "bound": sorted((plain(name), sorted(paths)) for name, paths in self.host_paths.bound.items()),
            "volumes": {
                name: (one.value.state, one.value.size_bytes, one.value.reserved_bytes, one.value.revision)
                for name, one in sorted(store.volume_records.items())
            },
            "stores": sorted(
                (plain(uid), one) for uid, one in (self.sized_volumes.stores | self.unsized_volumes.stores).items()
            ),
            "locks": sorted(map(str, store.locks)),
        }

    def check_consistency(self) -> None:
        """What must be true whenever nothing is at work."""
        assert not self.store.locks
        assert not self.snapshots.partial
        for holder in self.store.holders[HOST].values():
            assert not holder.operation_id, "a claim is not settled"
            assert holder.container in self.store.container_records
        for name, stored in self.store.container_records.items():
            placement = stored.value.status.placement
            assert len(self.claims(name)) == len(placement.gpu_uuids) + len(placement.ports)
