"""Chooses GPUs and host ports. A choice is only a proposal until a transaction claims it."""

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
    """The GPUs and ports that a container requests.

    `current`: the placement it holds, kept where possible. `previous`: the placement it held before, preferred if free.
    """

    uid: str
    gpus: GpuRequest
    ports: tuple[PortRequest, ...]
    current: Placement = field(default_factory=Placement)
    previous: Placement = field(default_factory=Placement)


@dataclass(frozen=True, slots=True)
class Allocation:
    """A placement that was free when it was chosen, and the claims that the container does not hold yet."""

    placement: Placement
    to_claim: tuple[ClaimKey, ...]


class Allocator:
    """Proposes placements on one host, from the claims in the store, the GPUs, and the ports in use."""

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
        """`port_range`: first and last port, both included, for requests without a port number.

        A request may name a port in that range or in `pinned_ranges`.
        """
        self._store = store
        self._inventory = inventory
        self._probe = probe
        self._host = host
        self._first_port, self._last_port = port_range
        self._pinnable_ranges = (port_range, *pinned_ranges)

    async def allocate(self, request: AllocationRequest) -> Allocation:
        """Choose the GPUs and ports for a request.

        Raises GpuExhausted, GpuNotFound, GpuUnhealthy, GpuBusy, PortForbidden, PortInUse, PortExhausted.
        """
        if not request.gpus.size and not request.ports:
            return Allocation(Placement(), ())
        table = await self._store.claims(self._host)
        gpus: tuple[str, ...] = ()
        if request.gpus.size:
            inventory = await self._inventory.snapshot()
            if not inventory.gpus and inventory.message:
                raise _no_gpus_error(request.gpus, inventory.message)
            gpus = choose_gpus(inventory.gpus, table, request)
        placement = Placement(gpu_uuids=gpus, ports=await self._choose_ports(table, request))
        held = set(table.claims_of_container(request.uid))
        return Allocation(placement, tuple(key for key in claim_keys(placement) if key not in held))

    async def _choose_ports(self, table: ClaimTable, request: AllocationRequest) -> tuple[PortBinding, ...]:
        taken: set[PortKey] = set()
        chosen: list[PortBinding] = []
        for port_request in request.ports:
            binding = await self._choose_port(table, request, port_request, taken)
            taken.add(PortKey(binding.protocol, binding.host_port))
            chosen.append(binding)
        return tuple(chosen)

    async def _choose_port(
        self, table: ClaimTable, request: AllocationRequest, port_request: PortRequest, taken: set[PortKey]
    ) -> PortBinding:
        for binding in request.current.ports:
            if binding.serves(port_request) and PortKey(binding.protocol, binding.host_port) not in taken:
                return binding
        if port_request.host_port:
            return await self._pinned_port(table, request, port_request)
        preferred = [
            b.host_port for b in request.previous.ports if b.serves(port_request) and self._is_allowed(b.host_port)
        ]
        # A port that another entry of the spec names must stay free for that entry.
        pinned = {other.host_port for other in request.ports if other.protocol == port_request.protocol}
        for port in (*preferred, *range(self._first_port, self._last_port + 1)):
            key = PortKey(port_request.protocol, port)
            if key in taken or port in pinned or table.holder(key) is not None:
                continue
            if await self._probe(port_request.protocol.value, port):
                return _binding(port_request, port)
        free = sum(
            table.holder(PortKey(port_request.protocol, port)) is None
            for port in range(self._first_port, self._last_port + 1)
        )
        raise PortExhausted(requested=len(request.ports), free=free, first=self._first_port, last=self._last_port)

    def _is_allowed(self, port: int) -> bool:
        return any(first <= port <= last for first, last in self._pinnable_ranges)

    async def _pinned_port(
        self, table: ClaimTable, request: AllocationRequest, port_request: PortRequest
    ) -> PortBinding:
        if not self._is_allowed(port_request.host_port):
            raise PortForbidden(
                host_port=port_request.host_port,
                protocol=port_request.protocol.value,
                allowed=tuple(f"{first}-{last}" for first, last in self._pinnable_ranges),
            )
        key = PortKey(port_request.protocol, port_request.host_port)
        holder = table.holder(key)
        if holder is not None and holder.uid != request.uid:
            raise PortInUse(
                host_port=port_request.host_port,
                protocol=port_request.protocol.value,
                holder=f"container {holder.container}",
            )
        if holder is None and not await self._probe(port_request.protocol.value, port_request.host_port):
            raise PortInUse(
                host_port=port_request.host_port,
                protocol=port_request.protocol.value,
                holder="a process outside gpudock",
            )
        return _binding(port_request, port_request.host_port)


def _binding(port_request: PortRequest, host_port: int) -> PortBinding:
    return PortBinding(container_port=port_request.container_port, protocol=port_request.protocol, host_port=host_port)


def _no_gpus_error(request: GpuRequest, reason: str) -> GpuExhausted | GpuNotFound:
    """The error when the driver reports no GPU at all, with the driver's reason."""
    if request.uuids:
        return GpuNotShown(uuids=request.uuids, available=(), detail=reason)
    return NoGpusShown(requested=request.count, free=0, matching=0, total=0, detail=reason)


def choose_gpus(gpus: Sequence[Gpu], table: ClaimTable, request: AllocationRequest) -> tuple[str, ...]:
    """Choose GPUs: first the current ones in their order, then the previous ones, then free ones by index.

    A current GPU that is not healthy is left out, so that scaling to the same number replaces it. A change that needs
    no new process does not choose GPUs (core/containers/change_plan.py).
    """
    if request.gpus.uuids:
        return _pinned_gpus(gpus, table, request)
    healthy = {gpu.uuid: gpu for gpu in gpus if gpu.schedulable}
    fitting = {uuid for uuid, gpu in healthy.items() if matches(gpu, request.gpus)}
    current = [uuid for uuid in request.current.gpu_uuids if uuid in fitting]
    free = [gpu.uuid for gpu in healthy.values() if table.holder(GpuKey(gpu.uuid)) is None]
    previous = [uuid for uuid in request.previous.gpu_uuids if uuid in free]
    ranked = list(dict.fromkeys([*current, *(uuid for uuid in (*previous, *free) if uuid in fitting)]))
    if len(ranked) < request.gpus.count:
        raise GpuExhausted(
            requested=request.gpus.count,
            free=len(free),
            matching=len(ranked),
            total=len(gpus),
            unhealthy=tuple(f"{gpu.uuid} ({unavailable_reason(gpu)})" for gpu in gpus if not gpu.schedulable),
        )
    return tuple(ranked[: request.gpus.count])


def _pinned_gpus(gpus: Sequence[Gpu], table: ClaimTable, request: AllocationRequest) -> tuple[str, ...]:
    known = {gpu.uuid: gpu for gpu in gpus}
    missing = tuple(uuid for uuid in request.gpus.uuids if uuid not in known)
    if missing:
        raise GpuNotFound(uuids=missing, available=tuple(known))
    for uuid in request.gpus.uuids:
        gpu = known[uuid]
        if not gpu.schedulable:
            raise GpuUnhealthy(uuid=uuid, health=gpu.health.value, detail=unavailable_reason(gpu))
        if not matches(gpu, request.gpus):
            raise GpuNotFound(uuids=(uuid,), available=tuple(u for u, g in known.items() if matches(g, request.gpus)))
        holder = table.holder(GpuKey(uuid))
        if holder is not None and holder.uid != request.uid:
            raise GpuBusy(uuid=uuid, container=holder.container)
    return request.gpus.uuids


def matches(gpu: Gpu, request: GpuRequest) -> bool:
    """Whether a GPU has the model and the memory that a request names."""
    return request.model.casefold() in gpu.name.casefold() and gpu.memory_total_bytes >= request.min_memory_bytes


def unavailable_reason(gpu: Gpu) -> str:
    """Why a GPU cannot be allocated; empty if it can."""
    if gpu.health is not GpuHealth.HEALTHY:
        return gpu.health_message or gpu.health.value
    return "" if gpu.schedulable else "MIG mode is enabled; gpudock allocates whole GPUs"
