"""Picks cards and ports. What is picked is only a proposal: the transaction that claims it decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gpudock_server.errors import (
    GpuBusy,
    GpuExhausted,
    GpuNotFound,
    GpuNotShown,
    GpuUnhealthy,
    NoGpusShown,
    PortExhausted,
    PortForbidden,
    PortInUse,
)
from gpudock_server.model.claims import ClaimKey, ClaimTable, GpuKey, PortKey, claim_keys
from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.gpu import Gpu, GpuHealth
from gpudock_server.model.spec import GpuRequest, PortRequest
from gpudock_server.ports import GpuInventory, PortProbe, Store


@dataclass(frozen=True, slots=True)
class AllocationRequest:
    """What a container asks for. `held` is what it has, and keeps where it can; `had` is what it would like back."""

    uid: str
    gpus: GpuRequest
    ports: tuple[PortRequest, ...]
    current: Placement = field(default_factory=Placement)
    previous: Placement = field(default_factory=Placement)


@dataclass(frozen=True, slots=True)
class Allocation:
    """A placement that was free when it was picked, and the claims that are new in it."""

    placement: Placement
    to_claim: tuple[ClaimKey, ...]


class Allocator:
    """Proposes placements on one host."""

    def __init__(
        self,
        *,
        store: Store,
        inventory: GpuInventory,
        probe: PortProbe,
        host: str,
        port_range: tuple[int, int],
        pinned_ranges: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`port_range` is the first and the last port, both included, that unnumbered ones come from.

        A request may pin a port of that range, or of `pinned_ranges`.
        """
        self._store = store
        self._inventory = inventory
        self._probe = probe
        self._host = host
        self._first_port, self._last_port = port_range
        self._pinnable_ranges = (port_range, *pinned_ranges)

    async def allocate(self, wanted: AllocationRequest) -> Allocation:
        """Pick, or say what is missing.

        Raises GpuExhausted, GpuNotFound, GpuUnhealthy, GpuBusy, PortForbidden, PortInUse, PortExhausted.
        """
        if not wanted.gpus.size and not wanted.ports:
            return Allocation(Placement(), ())
        table = await self._store.claims(self._host)
        gpus: tuple[str, ...] = ()
        if wanted.gpus.size:
            inventory = await self._inventory.snapshot()
            if not inventory.gpus and inventory.message:
                raise _none_shown(wanted.gpus, inventory.message)
            gpus = choose_gpus(inventory.gpus, table, wanted)
        placement = Placement(gpu_uuids=gpus, ports=await self._choose_ports(table, wanted))
        mine = set(table.claims_of_container(wanted.uid))
        return Allocation(placement, tuple(key for key in claim_keys(placement) if key not in mine))

    async def _choose_ports(self, table: ClaimTable, wanted: AllocationRequest) -> tuple[PortBinding, ...]:
        taken: set[PortKey] = set()
        chosen: list[PortBinding] = []
        for request in wanted.ports:
            binding = await self._choose_port(table, wanted, request, taken)
            taken.add(PortKey(binding.protocol, binding.host_port))
            chosen.append(binding)
        return tuple(chosen)

    async def _choose_port(
        self, table: ClaimTable, wanted: AllocationRequest, request: PortRequest, taken: set[PortKey]
    ) -> PortBinding:
        for binding in wanted.current.ports:
            if binding.serves(request) and PortKey(binding.protocol, binding.host_port) not in taken:
                return binding
        if request.host_port:
            return await self._pinned_port(table, wanted, request)
        preferred = [b.host_port for b in wanted.previous.ports if b.serves(request) and self._is_allowed(b.host_port)]
        # A port that the spec pins elsewhere is not for its unnumbered ones.
        pinned = {other.host_port for other in wanted.ports if other.protocol == request.protocol}
        for port in (*preferred, *range(self._first_port, self._last_port + 1)):
            key = PortKey(request.protocol, port)
            if key in taken or port in pinned or table.holder(key) is not None:
                continue
            if await self._probe(request.protocol.value, port):
                return _binding(request, port)
        free = sum(
            table.holder(PortKey(request.protocol, port)) is None
            for port in range(self._first_port, self._last_port + 1)
        )
        raise PortExhausted(requested=len(wanted.ports), free=free, first=self._first_port, last=self._last_port)

    def _is_allowed(self, port: int) -> bool:
        return any(first <= port <= last for first, last in self._pinnable_ranges)

    async def _pinned_port(self, table: ClaimTable, wanted: AllocationRequest, request: PortRequest) -> PortBinding:
        if not self._is_allowed(request.host_port):
            raise PortForbidden(
                host_port=request.host_port,
                protocol=request.protocol.value,
                allowed=tuple(f"{first}-{last}" for first, last in self._pinnable_ranges),
            )
        key = PortKey(request.protocol, request.host_port)
        holder = table.holder(key)
        if holder is not None and holder.uid != wanted.uid:
            raise PortInUse(
                host_port=request.host_port, protocol=request.protocol.value, holder=f"container {holder.container}"
            )
        if holder is None and not await self._probe(request.protocol.value, request.host_port):
            raise PortInUse(
                host_port=request.host_port, protocol=request.protocol.value, holder="a process outside gpudock"
            )
        return _binding(request, request.host_port)


def _binding(request: PortRequest, host_port: int) -> PortBinding:
    return PortBinding(container_port=request.container_port, protocol=request.protocol, host_port=host_port)


def _none_shown(request: GpuRequest, why: str) -> GpuExhausted | GpuNotFound:
    """What a request for cards ends with where the driver shows none: a number would not say what to look at."""
    if request.uuids:
        return GpuNotShown(uuids=request.uuids, available=(), detail=why)
    return NoGpusShown(requested=request.count, free=0, matching=0, total=0, detail=why)


def choose_gpus(gpus: Sequence[Gpu], table: ClaimTable, wanted: AllocationRequest) -> tuple[str, ...]:
    """Pick cards: those it holds first, in their order, then those it had, then free ones by index.

    A card that it holds but that is no longer healthy is left out, so that scaling to the same number replaces it.
    A change that needs no new process chooses no cards at all (core/containers/change_plan.py).
    """
    if wanted.gpus.uuids:
        return _pinned_gpus(gpus, table, wanted)
    request = wanted.gpus
    healthy = {gpu.uuid: gpu for gpu in gpus if gpu.schedulable}
    fitting = {uuid for uuid, gpu in healthy.items() if matches(gpu, request)}
    held = [uuid for uuid in wanted.current.gpu_uuids if uuid in fitting]
    free = [gpu.uuid for gpu in healthy.values() if table.holder(GpuKey(gpu.uuid)) is None]
    had = [uuid for uuid in wanted.previous.gpu_uuids if uuid in free]
    ranked = list(dict.fromkeys([*held, *(uuid for uuid in (*had, *free) if uuid in fitting)]))
    if len(ranked) < request.count:
        raise GpuExhausted(
            requested=request.count,
            free=len(free),
            matching=len(ranked),
            total=len(gpus),
            unhealthy=tuple(f"{gpu.uuid} ({unavailable_reason(gpu)})" for gpu in gpus if not gpu.schedulable),
        )
    return tuple(ranked[: request.count])


def _pinned_gpus(gpus: Sequence[Gpu], table: ClaimTable, wanted: AllocationRequest) -> tuple[str, ...]:
    known = {gpu.uuid: gpu for gpu in gpus}
    missing = tuple(uuid for uuid in wanted.gpus.uuids if uuid not in known)
    if missing:
        raise GpuNotFound(uuids=missing, available=tuple(known))
    for uuid in wanted.gpus.uuids:
        gpu = known[uuid]
        if not gpu.schedulable:
            raise GpuUnhealthy(uuid=uuid, health=gpu.health.value, detail=unavailable_reason(gpu))
        if not matches(gpu, wanted.gpus):
            raise GpuNotFound(uuids=(uuid,), available=tuple(u for u, g in known.items() if matches(g, wanted.gpus)))
        holder = table.holder(GpuKey(uuid))
        if holder is not None and holder.uid != wanted.uid:
            raise GpuBusy(uuid=uuid, container=holder.container)
    return wanted.gpus.uuids


def matches(gpu: Gpu, request: GpuRequest) -> bool:
    """Whether a card is of the model and has the memory that a request names."""
    return request.model.casefold() in gpu.name.casefold() and gpu.memory_total_bytes >= request.min_memory_bytes


def unavailable_reason(gpu: Gpu) -> str:
    """Why a card is not handed out; empty when it can be."""
    if gpu.health is not GpuHealth.HEALTHY:
        return gpu.health_message or gpu.health.value
    return "" if gpu.schedulable else "it is in MIG mode, and whole cards are handed out"
