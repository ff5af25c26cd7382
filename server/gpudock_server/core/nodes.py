"""A node's GPUs, ports, disk and volumes, their holders, and the state of its engine and store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.errors import GpudockError, NodeNotFound, OtherNodeRequested
from gpudock_server.model.claims import ClaimTable, GpuKey, Holder, PortKey
from gpudock_server.model.engine import EngineInfo
from gpudock_server.model.gpu import Gpu, GpuReport
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.volume import PoolUsage
from gpudock_server.ports import DiskUsage, Engine, GpuInventory, HostUsage, LayerStore, Store, StoreUsage

T = TypeVar("T")

# An engine or store that needs longer than this is shown as not answering.
_PROBE_TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class HeldGpu:
    """A GPU and the container that holds it; None where it is free."""

    gpu: Gpu
    holder: Holder | None


@dataclass(frozen=True, slots=True)
class HeldPort:
    """A claimed host port and the container that holds it."""

    key: PortKey
    holder: Holder


@dataclass(frozen=True, slots=True)
class VolumePool:
    """The space that volumes with a size share, and the ratio by which it may be overcommitted."""

    path: str
    usage: PoolUsage
    overcommit: float


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as of now. An engine or store that did not answer has an error; `engine` is its last answer.

    `disk` is the filesystem of the engine's data folder.
    """

    name: str
    version: str
    start_time: datetime
    engine: EngineInfo | None
    engine_error: str
    store_version: str
    store_error: str
    store_usage: StoreUsage | None
    gpus: GpuReport
    claims: ClaimTable
    port_range: tuple[int, int]
    memory_available_bytes: int
    disk: DiskUsage | None
    volume_pool: VolumePool | None
    carry_methods: tuple[tuple[LayerTransferMethod, str], ...]

    @property
    def free_gpus(self) -> int:
        """How many GPUs could be allocated now; 0 while the claims cannot be read."""
        if self.store_error:
            return 0
        return sum(gpu.schedulable and self.claims.holder(GpuKey(gpu.uuid)) is None for gpu in self.gpus.gpus)

    @property
    def claimed_gpus(self) -> int:
        """How many GPUs containers hold."""
        return sum(isinstance(key, GpuKey) for key in self.claims.claims)


class Nodes:
    """Reads the state of this node."""

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        layers: LayerStore,
        inventory: GpuInventory,
        host_usage: HostUsage,
        claims: HostClaims,
        backends: VolumeBackends,
        version: str,
        start_time: datetime,
        port_range: tuple[int, int],
    ) -> None:
        """`version` is the daemon's; `port_range` has the first and last host port, both included."""
        self._store = store
        self._engine = engine
        self._layers = layers
        self._claims = claims
        self._backends = backends
        self._inventory = inventory
        self._host_usage = host_usage
        self._version = version
        self._start_time = start_time
        self._port_range = port_range
        self._engine_info: EngineInfo | None = None

    async def check(self, name: str) -> None:
        """Require that a node name means this node, as an empty name does.

        Raises OtherNodeRequested, NodeNotFound; StoreUnavailable where the other nodes cannot be read.
        """
        if name in ("", self._claims.node):
            return
        for node in await self._store.nodes():
            if node.node == name:
                raise OtherNodeRequested(node=name, address=node.address)
        raise NodeNotFound(node=name)

    @property
    def port_range(self) -> tuple[int, int]:
        """The first and the last host port that is allocated."""
        return self._port_range

    async def get(self, name: str) -> NodeView:
        """The state of this node, also where its engine or store does not answer. Raises as `check`."""
        await self.check(name)
        (engine, engine_error), (store_version, store_error), (claims, claims_error), (usage, _) = await asyncio.gather(
            _value_or_error(self._engine.info()),
            _value_or_error(self._store.ping()),
            _value_or_error(self._store.claims(self._claims.host)),
            _value_or_error(self._store.usage()),
        )
        engine = self._engine_info = engine or self._engine_info
        return NodeView(
            name=self._claims.node,
            version=self._version,
            start_time=self._start_time,
            engine=engine,
            engine_error=engine_error,
            store_version=store_version or "",
            store_error=store_error or claims_error,
            store_usage=usage,
            gpus=await self._inventory.snapshot(),
            claims=claims or ClaimTable(),
            port_range=self._port_range,
            memory_available_bytes=await self._host_usage.memory_available_bytes(),
            disk=await self._host_usage.disk(engine.root_dir) if engine else None,
            volume_pool=await self._volume_pool(),
            carry_methods=await self._layers.methods(),
        )

    async def _volume_pool(self) -> VolumePool | None:
        backends = self._backends
        usage, _ = await _value_or_error(backends.pool_usage())
        return VolumePool(backends.path, usage, backends.overcommit) if usage else None

    async def gpus(self, name: str) -> tuple[HeldGpu, ...]:
        """The GPUs of this node with their holders, by index. Raises as `check`, and StoreUnavailable."""
        await self.check(name)
        snapshot = await self._inventory.snapshot()
        table = await self._store.claims(self._claims.host)
        return tuple(HeldGpu(gpu, table.holder(GpuKey(gpu.uuid))) for gpu in snapshot.gpus)

    async def ports(self, name: str) -> tuple[HeldPort, ...]:
        """The claimed ports of this node, by number. Raises as `check`, and StoreUnavailable."""
        await self.check(name)
        table = await self._store.claims(self._claims.host)
        held = [HeldPort(key, holder) for key, holder in table.claims.items() if isinstance(key, PortKey)]
        return tuple(sorted(held, key=lambda port: (port.key.port, port.key.protocol)))


async def _value_or_error(call: Awaitable[T]) -> tuple[T | None, str]:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_SECONDS):
            return await call, ""
    except TimeoutError:
        return None, f"no answer within {_PROBE_TIMEOUT_SECONDS:g} s"
    except GpudockError as error:
        return None, error.message
