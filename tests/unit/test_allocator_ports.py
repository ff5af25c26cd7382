"""Which ports are proposed, what is claimed for a proposal, and what a refusal says."""

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

MINE, HOST = "mine", "here"
TCP, UDP = Protocol.TCP, Protocol.UDP
# What unnumbered ports come from, and what may be pinned beside them.
FIRST, LAST = 100, 103
PINNED = ((80, 81), (443, 443))


class Host:
    """A host whose ports a test holds for a container (`hold`), or has a process of the host listen on (`busy`)."""

    def __init__(self) -> None:
        self.busy: set[tuple[str, int]] = set()
        self.probed: list[tuple[str, int]] = []
        self.store = MemoryStore()
        self.inventory: GpuInventory = FakeInventory()
        # The same ports of another machine are another matter.
        for port in range(FIRST, LAST + 1):
            self.store.holders["there"][PortKey(TCP, port)] = Holder(container="far", uid="far", node="n")

    def hold(self, uid: str, *keys: ClaimKey) -> None:
        """Have container `<uid>'s` with this uid hold claims."""
        for key in keys:
            self.store.holders[HOST][key] = Holder(container=f"{uid}'s", uid=uid, node="n")

    async def probe(self, protocol: str, port: int) -> bool:
        """A PortProbe."""
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
        """Ask for ports and cards."""
        allocator = Allocator(
            store=self.store,
            inventory=self.inventory,
            probe=self.probe,
            host=HOST,
            port_range=(FIRST, LAST),
            pinned_ranges=PINNED,
        )
        wanted = AllocationRequest(
            uid=MINE,
            gpus=GpuRequest(count=gpus, uuids=pinned_gpus),
            ports=ports,
            current=Placement(gpu_uuids=held_gpus, ports=tuple(held)),
            previous=Placement(ports=tuple(had)),
        )
        return await allocator.allocate(wanted)

    async def ports(
        self, *ports: PortRequest, held: Sequence[PortBinding] = (), had: Sequence[PortBinding] = ()
    ) -> list[int]:
        """The numbers that are proposed."""
        allocation = await self.allocate(*ports, held=held, had=had)
        chosen = allocation.placement.ports
        assert [(one.container_port, one.protocol) for one in chosen] == [
            (asked.container_port, asked.protocol) for asked in ports
        ]
        return [binding.host_port for binding in chosen]


def ask(container_port: int = 8080, host_port: int = 0, protocol: Protocol = TCP) -> PortRequest:
    return PortRequest(container_port=container_port, host_port=host_port, protocol=protocol)


def bound(host_port: int, container_port: int = 8080, protocol: Protocol = TCP) -> PortBinding:
    return PortBinding(container_port=container_port, host_port=host_port, protocol=protocol)


@pytest.fixture
def host() -> Host:
    return Host()


async def test_unnumbered_ports_are_the_first_free_ones(host: Host) -> None:
    host.hold("other", PortKey(TCP, 100))
    host.busy = {("tcp", 101)}
    assert await host.ports(ask(1), ask(2)) == [102, 103]
    # What another protocol uses is free for this one.
    assert await host.ports(ask(1, protocol=UDP), ask(2, protocol=TCP)) == [100, 102]


async def test_the_range_includes_its_last_port_and_no_more(host: Host) -> None:
    host.hold("other", PortKey(TCP, 100), PortKey(TCP, 101))
    host.busy = {("tcp", 102)}
    assert await host.ports(ask()) == [103]
    with pytest.raises(PortExhausted) as refused:
        await host.ports(ask(1), ask(2))
    # One that a process listens on is held by no container.
    assert refused.value.metadata == {"requested": "2", "free": "2", "first": "100", "last": "103"}
    # UDP has the same numbers once more.
    assert await host.ports(*(ask(number, protocol=UDP) for number in range(1, 5))) == [100, 101, 102, 103]


async def test_an_exhausted_range_counts_what_is_free_of_that_protocol(host: Host) -> None:
    host.hold("other", *(PortKey(UDP, port) for port in range(FIRST, LAST + 1)), PortKey(TCP, 103))
    with pytest.raises(PortExhausted) as refused:
        await host.ports(ask(protocol=UDP))
    assert refused.value.metadata == {"requested": "1", "free": "0", "first": "100", "last": "103"}


async def test_keeps_the_ports_that_it_holds(host: Host) -> None:
    host.hold(MINE, PortKey(TCP, 102), PortKey(UDP, 103))
    held = [bound(102, 1), bound(103, 2, UDP)]
    assert await host.ports(ask(1), ask(2, protocol=UDP), held=held) == [102, 103]
    assert not host.probed, "its own process listens there"
    # A port that serves another request of it is not for this one.
    assert await host.ports(ask(3), held=held) == [100]
    assert await host.ports(ask(2), held=held) == [100]


async def test_a_port_that_it_holds_serves_one_request_only(host: Host) -> None:
    host.hold(MINE, PortKey(TCP, 102))
    assert await host.ports(ask(1), ask(1), held=[bound(102, 1)]) == [102, 100]


async def test_a_request_that_pins_another_port_than_it_holds_moves(host: Host) -> None:
    host.hold(MINE, PortKey(TCP, 102))
    assert await host.ports(ask(1, 443), held=[bound(102, 1)]) == [443]
    assert await host.ports(ask(1, 102), held=[bound(102, 1)]) == [102]


async def test_gets_back_what_it_had_where_it_is_free(host: Host) -> None:
    assert await host.ports(ask(1), had=[bound(102, 1)]) == [102]
    # Of another request, of another protocol, taken, listened on, or no longer to be had.
    assert await host.ports(ask(1), had=[bound(102, 2)]) == [100]
    assert await host.ports(ask(1), had=[bound(102, 1, UDP)]) == [100]
    assert await host.ports(ask(1), had=[bound(900, 1)]) == [100]
    host.hold("other", PortKey(TCP, 102))
    host.busy = {("tcp", 103)}
    assert await host.ports(ask(1), had=[bound(102, 1)]) == [100]
    assert await host.ports(ask(1), had=[bound(103, 1)]) == [100]
    # A pinned one was outside the range, and may be had again.
    assert await host.ports(ask(1), had=[bound(81, 1)]) == [81]


async def test_a_port_that_the_spec_pins_is_not_for_its_unnumbered_ones(host: Host) -> None:
    assert await host.ports(ask(1), ask(2, 100)) == [101, 100]
    assert await host.ports(ask(1), ask(2, 100, UDP)) == [100, 100]


@pytest.mark.parametrize("port", [80, 81, 443, FIRST, LAST])
async def test_a_port_of_a_range_may_be_pinned(host: Host, port: int) -> None:
    assert await host.ports(ask(1, port)) == [port]
    assert host.probed == [("tcp", port)]


@pytest.mark.parametrize("port", [79, 82, 442, 444, FIRST - 1, LAST + 1])
async def test_another_port_may_not(host: Host, port: int) -> None:
    with pytest.raises(PortForbidden) as refused:
        await host.ports(ask(1, port, UDP))
    assert refused.value.metadata == {
        "host_port": str(port),
        "protocol": "udp",
        "allowed": "100-103,80-81,443-443",
    }
    assert not host.probed


async def test_a_pinned_port_that_is_in_use_says_by_whom(host: Host) -> None:
    host.hold("other", PortKey(TCP, 443))
    with pytest.raises(PortInUse) as refused:
        await host.ports(ask(1, 443))
    assert refused.value.metadata == {"host_port": "443", "protocol": "tcp", "holder": "container other's"}
    assert not host.probed
    host.busy = {("udp", 443)}
    with pytest.raises(PortInUse) as refused:
        await host.ports(ask(1, 443, UDP))
    assert refused.value.metadata == {"host_port": "443", "protocol": "udp", "holder": "a process outside gpudock"}


async def test_a_pinned_port_that_it_holds_is_not_looked_at(host: Host) -> None:
    """For another port of its own than before: it may listen there already."""
    host.hold(MINE, PortKey(TCP, 443))
    host.busy = {("tcp", 443)}
    assert await host.ports(ask(2, 443), held=[bound(443, 1)]) == [443]


async def test_only_what_it_does_not_hold_is_claimed(host: Host) -> None:
    host.hold(MINE, PortKey(TCP, 102), GpuKey("GPU-5"))
    host.hold("other", GpuKey("GPU-0"))
    allocation = await host.allocate(ask(1), ask(2), held=[bound(102, 1)], gpus=2, held_gpus=("GPU-5",))
    assert allocation.placement == Placement(gpu_uuids=("GPU-5", "GPU-1"), ports=(bound(102, 1), bound(100, 2)))
    assert allocation.to_claim == (GpuKey("GPU-1"), PortKey(TCP, 100))


async def test_asking_for_nothing_claims_nothing(host: Host) -> None:
    assert await host.allocate() == Allocation(Placement(), ())


class WithoutDriver(GpuInventory):
    """A node whose driver does not answer."""

    @override
    async def snapshot(self) -> GpuReport:
        return GpuReport(message="the NVIDIA driver is gone")


async def test_where_the_driver_shows_no_cards_it_says_why(host: Host) -> None:
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
    assert (await host.allocate(ask())).to_claim == (PortKey(TCP, 100),)


async def test_cards_alone_and_ports_alone(host: Host) -> None:
    assert (await host.allocate(gpus=1)).to_claim == (GpuKey("GPU-0"),)
    assert (await host.allocate(ask())).to_claim == (PortKey(TCP, 100),)
