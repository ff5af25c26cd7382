"""Which host ports are allocated, what is claimed for an allocation, and what a refusal says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from gpudock_server.core.placement.allocator import Allocation, AllocationRequest, Allocator
from gpudock_server.errors import GpuExhausted, GpuNotFound, PortExhausted, PortForbidden, PortInUse
from gpudock_server.model.claims import ClaimKey, GpuKey, Holder, PortKey
from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.gpu import GpuReport
from gpudock_server.model.spec import GpuRequest, PortRequest, Protocol
from gpudock_server.ports import GpuInventory
from typing_extensions import override

from tests.rpc.fakes import FakeInventory
from tests.rpc.memory_store import MemoryStore

MINE, HOST = "mine", "host1"
TCP, UDP = Protocol.TCP, Protocol.UDP
# The range of ports without a number, and the ranges that can be pinned as well.
FIRST, LAST = 100, 103
PINNED = ((80, 81), (443, 443))


class Host:
    """A host. `hold` claims ports for a container; `busy` are ports that a process outside gpudock listens on."""

    def __init__(self) -> None:
        self.busy: set[tuple[str, int]] = set()
        self.probed: list[tuple[str, int]] = []
        self.store = MemoryStore()
        self.inventory: GpuInventory = FakeInventory()
        # Claims on the same ports of another host do not count.
        for port in range(FIRST, LAST + 1):
            self.store.holders["host2"][PortKey(TCP, port)] = Holder(container="far", uid="far", node="n")

    def hold(self, uid: str, *keys: ClaimKey) -> None:
        """Claim keys for the container with this uid and the name `<uid>'s`."""
        for key in keys:
            self.store.holders[HOST][key] = Holder(container=f"{uid}'s", uid=uid, node="n")

    async def probe(self, protocol: str, port: int) -> bool:
        """Return whether no process listens on a port, as a PortProbe."""
        self.probed.append((protocol, port))
        return (protocol, port) not in self.busy

    async def allocate(
        self,
        *ports: PortRequest,
        held: Sequence[PortBinding] = (),
        had: Sequence[PortBinding] = (),
        gpus: int = 0,
        held_gpus: tuple[str, ...] = (),
        pinned_gpus: tuple[str, ...] = (),
    ) -> Allocation:
        """Allocate ports and GPUs."""
        allocator = Allocator(
            store=self.store,
            inventory=self.inventory,
            probe=self.probe,
            host=HOST,
            port_range=(FIRST, LAST),
            pinned_ranges=PINNED,
        )
        request = AllocationRequest(
            uid=MINE,
            gpus=GpuRequest(count=gpus, uuids=pinned_gpus),
            ports=ports,
            current=Placement(gpu_uuids=held_gpus, ports=tuple(held)),
            previous=Placement(ports=tuple(had)),
        )
        return await allocator.allocate(request)

    async def ports(
        self, *ports: PortRequest, held: Sequence[PortBinding] = (), had: Sequence[PortBinding] = ()
    ) -> list[int]:
        """Allocate ports; return their numbers."""
        allocation = await self.allocate(*ports, held=held, had=had)
        chosen = allocation.placement.ports
        assert [(binding.container_port, binding.protocol) for binding in chosen] == [
            (request.container_port, request.protocol) for request in ports
        ]
        return [binding.host_port for binding in chosen]


def port_request(container_port: int = 8080, host_port: int = 0, protocol: Protocol = TCP) -> PortRequest:
    return PortRequest(container_port=container_port, host_port=host_port, protocol=protocol)


def binding(host_port: int, container_port: int = 8080, protocol: Protocol = TCP) -> PortBinding:
    return PortBinding(container_port=container_port, host_port=host_port, protocol=protocol)


@pytest.fixture
def host() -> Host:
    return Host()


async def test_ports_without_a_number_get_the_first_free_ones(host: Host) -> None:
    host.hold("other", PortKey(TCP, 100))
    host.busy = {("tcp", 101)}
    assert await host.ports(port_request(1), port_request(2)) == [102, 103]
    # A port that TCP uses is free for UDP.
    assert await host.ports(port_request(1, protocol=UDP), port_request(2, protocol=TCP)) == [100, 102]


async def test_the_range_includes_its_last_port_and_no_more(host: Host) -> None:
    host.hold("other", PortKey(TCP, 100), PortKey(TCP, 101))
    host.busy = {("tcp", 102)}
    assert await host.ports(port_request()) == [103]
    with pytest.raises(PortExhausted) as refused:
        await host.ports(port_request(1), port_request(2))
    # A port that a process listens on counts as free, since no container claims it.
    assert refused.value.metadata == {"requested": "2", "free": "2", "first": "100", "last": "103"}
    # UDP has its own ports.
    assert await host.ports(*(port_request(number, protocol=UDP) for number in range(1, 5))) == [100, 101, 102, 103]


async def test_an_exhausted_range_reports_the_free_ports_of_the_protocol(host: Host) -> None:
    host.hold("other", *(PortKey(UDP, port) for port in range(FIRST, LAST + 1)), PortKey(TCP, 103))
    with pytest.raises(PortExhausted) as refused:
        await host.ports(port_request(protocol=UDP))
    assert refused.value.metadata == {"requested": "1", "free": "0", "first": "100", "last": "103"}


async def test_held_ports_are_kept(host: Host) -> None:
    host.hold(MINE, PortKey(TCP, 102), PortKey(UDP, 103))
    held = [binding(102, 1), binding(103, 2, UDP)]
    assert await host.ports(port_request(1), port_request(2, protocol=UDP), held=held) == [102, 103]
    assert not host.probed, "a held port was probed; the process of the container may listen on it"
    # A port that is held for another container port is not reused.
    assert await host.ports(port_request(3), held=held) == [100]
    assert await host.ports(port_request(2), held=held) == [100]


async def test_a_held_port_satisfies_one_request_only(host: Host) -> None:
    host.hold(MINE, PortKey(TCP, 102))
    assert await host.ports(port_request(1), port_request(1), held=[binding(102, 1)]) == [102, 100]


async def test_a_pinned_port_replaces_another_held_port(host: Host) -> None:
    host.hold(MINE, PortKey(TCP, 102))
    assert await host.ports(port_request(1, 443), held=[binding(102, 1)]) == [443]
    assert await host.ports(port_request(1, 102), held=[binding(102, 1)]) == [102]


async def test_previous_ports_are_allocated_again_if_they_are_free(host: Host) -> None:
    assert await host.ports(port_request(1), had=[binding(102, 1)]) == [102]
    # Not if the port was for another container port or protocol, is outside the ranges, claimed, or listened on.
    assert await host.ports(port_request(1), had=[binding(102, 2)]) == [100]
    assert await host.ports(port_request(1), had=[binding(102, 1, UDP)]) == [100]
    assert await host.ports(port_request(1), had=[binding(900, 1)]) == [100]
    host.hold("other", PortKey(TCP, 102))
    host.busy = {("tcp", 103)}
    assert await host.ports(port_request(1), had=[binding(102, 1)]) == [100]
    assert await host.ports(port_request(1), had=[binding(103, 1)]) == [100]
    # A port that was pinned is outside the range and is allocated again.
    assert await host.ports(port_request(1), had=[binding(81, 1)]) == [81]


async def test_a_pinned_port_is_not_given_to_a_port_without_a_number(host: Host) -> None:
    assert await host.ports(port_request(1), port_request(2, 100)) == [101, 100]
    assert await host.ports(port_request(1), port_request(2, 100, UDP)) == [100, 100]


@pytest.mark.parametrize("port", [80, 81, 443, FIRST, LAST])
async def test_a_port_of_a_range_can_be_pinned(host: Host, port: int) -> None:
    assert await host.ports(port_request(1, port)) == [port]
    assert host.probed == [("tcp", port)]


@pytest.mark.parametrize("port", [79, 82, 442, 444, FIRST - 1, LAST + 1])
async def test_a_port_outside_the_ranges_cannot_be_pinned(host: Host, port: int) -> None:
    with pytest.raises(PortForbidden) as refused:
        await host.ports(port_request(1, port, UDP))
    assert refused.value.metadata == {
        "host_port": str(port),
        "protocol": "udp",
        "allowed": "100-103,80-81,443-443",
    }
    assert not host.probed


async def test_a_pinned_port_in_use_is_refused_with_its_holder(host: Host) -> None:
    host.hold("other", PortKey(TCP, 443))
    with pytest.raises(PortInUse) as refused:
        await host.ports(port_request(1, 443))
    assert refused.value.metadata == {"host_port": "443", "protocol": "tcp", "holder": "container other's"}
    assert not host.probed
    host.busy = {("udp", 443)}
    with pytest.raises(PortInUse) as refused:
        await host.ports(port_request(1, 443, UDP))
    assert refused.value.metadata == {"host_port": "443", "protocol": "udp", "holder": "a process outside gpudock"}


async def test_a_pinned_port_that_the_container_holds_is_not_probed(host: Host) -> None:
    """The process of the container may listen on it already, for another container port."""
    host.hold(MINE, PortKey(TCP, 443))
    host.busy = {("tcp", 443)}
    assert await host.ports(port_request(2, 443), held=[binding(443, 1)]) == [443]


async def test_only_new_gpus_and_ports_are_claimed(host: Host) -> None:
    host.hold(MINE, PortKey(TCP, 102), GpuKey("GPU-5"))
    host.hold("other", GpuKey("GPU-0"))
    allocation = await host.allocate(
        port_request(1), port_request(2), held=[binding(102, 1)], gpus=2, held_gpus=("GPU-5",)
    )
    assert allocation.placement == Placement(gpu_uuids=("GPU-5", "GPU-1"), ports=(binding(102, 1), binding(100, 2)))
    assert allocation.to_claim == (GpuKey("GPU-1"), PortKey(TCP, 100))


async def test_an_empty_request_claims_nothing(host: Host) -> None:
    assert await host.allocate() == Allocation(Placement(), ())


class WithoutDriver(GpuInventory):
    """A node without a working driver."""

    @override
    async def snapshot(self) -> GpuReport:
        return GpuReport(message="the NVIDIA driver is gone")


async def test_a_node_without_a_working_driver_reports_its_message(host: Host) -> None:
    host.inventory = WithoutDriver()
    with pytest.raises(
        GpuExhausted, match="2 GPUs requested, and this node shows none: the NVIDIA driver is gone"
    ) as few:
        await host.allocate(gpus=2)
    assert (few.value.requested, few.value.total) == (2, 0)
    with pytest.raises(GpuNotFound, match="no GPU GPU-1; it shows none: the NVIDIA driver is gone") as missing:
        await host.allocate(pinned_gpus=("GPU-1",))
    for refused in (few.value, missing.value):
        assert refused.metadata["detail"] == "the NVIDIA driver is gone"
    assert (await host.allocate(port_request())).to_claim == (PortKey(TCP, 100),)


async def test_gpus_and_ports_can_be_requested_separately(host: Host) -> None:
    assert (await host.allocate(gpus=1)).to_claim == (GpuKey("GPU-0"),)
    assert (await host.allocate(port_request())).to_claim == (PortKey(TCP, 100),)
