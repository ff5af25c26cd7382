"""NodeService on the rig: the node, its GPUs and its ports, and how containers claim them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from gpudock.v1 import (
    container_pb2,
    container_service_pb2,
    gpu_pb2,
    node_pb2,
    node_service_pb2,
    operation_pb2,
    port_pb2,
)

from tests.calls import Caller, failure, progress_of, result_of, scale_request
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, ports_in_use, until
from tests.rig import EngineProxy, FakeGpus, Rig
from tests.rig.patience import limit
from tests.selection import deep_except

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
# A GPU that this node does not have.
UNKNOWN_GPU = "GPU-5f0e2a31-97d4-5c55-b5f3-0d6d7a4f3c11"
TCP, UDP = port_pb2.PORT_PROTOCOL_TCP, port_pb2.PORT_PROTOCOL_UDP


async def node_of(caller: Caller) -> node_pb2.Node:
    """The node of the daemon."""
    return (await caller.nodes.GetNode(node_service_pb2.GetNodeRequest())).node


async def gpus_of(caller: Caller, **fields: object) -> list[gpu_pb2.Gpu]:
    """The first page of a list of GPUs."""
    request = node_service_pb2.ListGpusRequest(**fields)  # type: ignore[arg-type]  # fields by name
    return list((await caller.nodes.ListGpus(request)).gpus)


async def test_get_node_returns_engine_capacity_claims_and_health(caller: Caller, rig: Rig) -> None:
    await caller.create("two", 2, ports=[container_pb2.PortRequest(container_port=80)])
    node = await node_of(caller)
    engine = rig.engine.call("GET", "/info")
    assert node.name
    assert node.daemon_version == "0.1.0"
    assert node.engine.id == engine["ID"]
    assert node.engine.version == engine["ServerVersion"]
    assert node.engine.storage_driver == engine["Driver"]
    assert node.engine.api_version
    assert node.etcd_version.startswith("3.")
    assert (node.driver_version, node.nvml_version, node.cuda_driver_version) == (
        "550.54.15",
        "12.550.54.15",
        "12.4",
    )
    assert (node.capacity.gpus, node.free_gpus, node.claimed_gpus) == (8, 6, 2)
    assert node.capacity.cpus == os.cpu_count()
    assert node.capacity.memory_bytes == engine["MemTotal"]
    assert 0 < node.memory_available_bytes <= node.capacity.memory_bytes
    assert (node.ports.first_port, node.ports.last_port) == (20000, 29999)
    assert (node.ports.free_tcp_ports, node.ports.free_udp_ports, node.ports.claimed_ports) == (9999, 10000, 1)
    assert node.disk.path == engine["DockerRootDir"]
    assert 0 < node.disk.free_bytes <= node.disk.total_bytes
    assert [(support.method, support.available) for support in node.layer_carry] == [
        (operation_pb2.LAYER_CARRY_METHOD_EXCHANGE, True),
        (operation_pb2.LAYER_CARRY_METHOD_COPY, True),
        (operation_pb2.LAYER_CARRY_METHOD_COMMIT, True),
    ]
    assert [(part.component, part.healthy) for part in node.components] == [
        (node_pb2.NODE_COMPONENT_ENGINE, True),
        (node_pb2.NODE_COMPONENT_STORE, True),
        (node_pb2.NODE_COMPONENT_GPU_DRIVER, True),
    ]
    assert node.HasField("start_time")
    named = await caller.nodes.GetNode(node_service_pb2.GetNodeRequest(name=node.name))
    assert named.node.name == node.name
    unknown = await failure(caller.nodes.GetNode(node_service_pb2.GetNodeRequest(name="nowhere")))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "NODE_NOT_FOUND")


async def test_an_error_about_another_node_has_its_address(daemons: IsolatedDaemons) -> None:
    first, second = await asyncio.gather(
        daemons.start(node=f"{daemons.node}-1"),
        daemons.start("--advertise-address", "gpu2:50051", node=f"{daemons.node}-2"),
    )
    assert second.running
    async with Caller(first.target) as caller:
        invalid = await failure(caller.nodes.GetNode(node_service_pb2.GetNodeRequest(name=f"{daemons.node}-2")))
        assert (invalid.code, invalid.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_NODE")
        assert (invalid.metadata["node"], invalid.metadata["address"]) == (f"{daemons.node}-2", "gpu2:50051")


@pytest.mark.deep
async def test_get_node_without_an_answering_engine_returns_its_last_values(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy
) -> None:
    daemon = await daemons.start("--engine-timeout", "30", docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        before = await node_of(caller)
        engine_proxy.faults.hang(".*", ".*", times=None)
        async with asyncio.timeout(limit(10)):
            node = await node_of(caller)
        assert not node.components[0].healthy
        assert node.components[0].message
        assert node.components[1].healthy
        assert node.engine == before.engine, "the last answer of the engine"
        assert node.capacity == before.capacity
        assert node.free_gpus == 8


async def test_a_gpu_is_listed_with_its_measurements_and_container(caller: Caller, gpus: FakeGpus) -> None:
    gpus.set(3, utilization_gpu_percent=42, temperature_celsius=66, power_milliwatts=345678)
    gpus.run_process(3, os.getpid(), 5 << 30)
    await caller.create("uses", 4)

    async def process_is_reported() -> bool:
        return bool((await gpus_of(caller))[3].processes)

    await until(process_is_reported)
    gpu = (await gpus_of(caller))[3]
    assert gpu.uuid == gpus.uuids[3]
    assert (gpu.index, gpu.minor_number, gpu.name) == (3, 3, "NVIDIA H100 80GB HBM3")
    assert gpu.pci_bus_id == "00000000:5D:00.0"
    assert gpu.memory_total_bytes == 85520809984
    assert gpu.memory_used_bytes == 5 << 30
    assert (gpu.utilization_percent, gpu.temperature_celsius, gpu.power_milliwatts) == (42, 66, 345678)
    assert gpu.mig_mode == gpu_pb2.MIG_MODE_DISABLED
    assert gpu.health == gpu_pb2.GPU_HEALTH_HEALTHY
    assert gpu.schedulable
    assert (gpu.health_message, gpu.unschedulable_reason) == ("", "")
    assert gpu.container == "uses"
    assert [(process.pid, process.used_memory_bytes) for process in gpu.processes] == [(os.getpid(), 5 << 30)]
    assert gpu.processes[0].name.startswith("python") or "pytest" in gpu.processes[0].name


async def test_gpus_are_listed_by_pages_and_filters(caller: Caller, gpus: FakeGpus) -> None:
    await caller.create("three", 3)
    indexes: list[int] = []
    token = ""
    for _ in range(3):
        request = node_service_pb2.ListGpusRequest(page_size=3, page_token=token)
        page = await caller.nodes.ListGpus(request)
        indexes += [gpu.index for gpu in page.gpus]
        token = page.next_page_token
    assert indexes == list(range(8))
    assert not token
    claimed = await gpus_of(caller, filter=node_service_pb2.GpuFilter(claimed=True))
    assert [gpu.index for gpu in claimed] == [0, 1, 2]
    assert len(await gpus_of(caller, filter=node_service_pb2.GpuFilter(claimed=False))) == 5
    assert len(await gpus_of(caller, filter=node_service_pb2.GpuFilter(container="three"))) == 3
    assert len(await gpus_of(caller, filter=node_service_pb2.GpuFilter(model="h100"))) == 8
    assert await gpus_of(caller, filter=node_service_pb2.GpuFilter(model="A100")) == []
    invalid = node_service_pb2.ListGpusRequest(page_token="x", page_size=-1)  # noqa: S106 - no password
    foreign = await failure(caller.nodes.ListGpus(invalid))
    assert foreign.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(foreign.violations) == {"page_token", "page_size"}
    assert gpus.uuids


@pytest.fixture
def failing_gpus(tmp_path: Path) -> FakeGpus:
    """GPUs of one daemon alone: a daemon remembers an XID of a GPU until it restarts."""
    return FakeGpus(tmp_path / "gpus")


@pytest_asyncio.fixture
async def failing_caller(daemons: IsolatedDaemons, failing_gpus: FakeGpus) -> AsyncIterator[Caller]:
    """Calls a daemon that has `failing_gpus`."""
    daemon = await daemons.start(environment={"GPUDOCK_NVML_STATE": str(failing_gpus.path)})
    async with Caller(daemon.target) as caller:
        yield caller
        await caller.delete_all()


async def test_lost_gpus_and_gpus_with_a_fatal_xid_are_not_allocated(
    failing_caller: Caller, failing_gpus: FakeGpus
) -> None:
    caller = failing_caller
    failing_gpus.lose(0, xid=79)
    failing_gpus.raise_xid(5, 79)
    failing_gpus.raise_xid(6, 31)

    async def failure_is_reported() -> bool:
        healths = [gpu.health for gpu in await gpus_of(caller)]
        return healths[0] == gpu_pb2.GPU_HEALTH_LOST and healths[5] == gpu_pb2.GPU_HEALTH_UNHEALTHY

    await until(failure_is_reported)
    gpus_now = await gpus_of(caller)
    assert gpus_now[6].health == gpu_pb2.GPU_HEALTH_HEALTHY, "XID 31 is an application error"
    assert "79" in gpus_now[5].health_message
    exhausted = await failure(caller.create("all", 7))
    assert (exhausted.code, exhausted.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "GPU_EXHAUSTED")
    for index in (0, 5):
        assert failing_gpus.uuids[index] in exhausted.message
        assert failing_gpus.uuids[index] in exhausted.metadata["unhealthy"]
    assert "79" in exhausted.message
    for index in (0, 5):
        spec = Caller.spec()
        spec.gpus.uuids.append(failing_gpus.uuids[index])
        pinned = await failure(_create(caller, spec))
        assert (pinned.code, pinned.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GPU_UNHEALTHY")
        assert failing_gpus.uuids[index] in pinned.message
    spec = Caller.spec()
    spec.gpus.uuids.append(UNKNOWN_GPU)
    unknown = await failure(_create(caller, spec))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "GPU_NOT_FOUND")
    assert UNKNOWN_GPU in unknown.message
    created = await caller.create("rest", 6)
    assert set(created.status.gpu_uuids) == set(failing_gpus.uuids) - {failing_gpus.uuids[0], failing_gpus.uuids[5]}
    assert (await node_of(caller)).free_gpus == 0


async def _create(caller: Caller, spec: container_pb2.ContainerSpec) -> container_pb2.Container:
    request = container_service_pb2.CreateContainerRequest(name="pinned", spec=spec)
    return await result_of(caller.containers.CreateContainer(request))


async def test_a_claimed_gpu_that_fails_is_replaced_by_the_next_scale(
    failing_caller: Caller, failing_gpus: FakeGpus
) -> None:
    caller = failing_caller
    created = await caller.create("lives", 2)
    failing_gpus.raise_xid(created.status.gpu_uuids[0], 79)

    async def failure_is_reported() -> bool:
        return any(gpu.health == gpu_pb2.GPU_HEALTH_UNHEALTHY for gpu in await gpus_of(caller))

    await until(failure_is_reported)
    after = await caller.scale("lives", 2)
    assert created.status.gpu_uuids[0] not in after.status.gpu_uuids
    assert created.status.gpu_uuids[1] in after.status.gpu_uuids
    assert len(after.status.gpu_uuids) == 2


@pytest.mark.parametrize("lost", deep_except([True], [True, False]), ids=["lost", "unhealthy"])
async def test_changes_without_a_restart_keep_a_failed_gpu(
    failing_caller: Caller, failing_gpus: FakeGpus, *, lost: bool
) -> None:
    caller = failing_caller
    created = await caller.create("lives", 2, memory_bytes=64 << 20)
    start_time = await caller.shell("lives", "cut -d' ' -f22 /proc/1/stat")
    if lost:
        failing_gpus.lose(created.status.gpu_uuids[0], xid=79)
    else:
        failing_gpus.raise_xid(created.status.gpu_uuids[0], 79)

    async def failure_is_reported() -> bool:
        return any(gpu.health != gpu_pb2.GPU_HEALTH_HEALTHY for gpu in await gpus_of(caller))

    await until(failure_is_reported)
    live = container_service_pb2.SCALE_STRATEGY_LIVE
    plan = await progress_of(
        caller.containers.ScaleContainer(scale_request("lives", memory_bytes=128 << 20, validate_only=True))
    )
    assert not plan.snapshots[0].plan.restarts_process
    changes = (
        caller.scale("lives", memory_bytes=128 << 20),
        caller.scale("lives", cpus=0.5, strategy=live),
        caller.scale("lives", memory_bytes=128 << 20, strategy=live),
        caller.update("lives", labels={"team": "vision"}),
        caller.start("lives"),
        caller.rollback("lives", 4),
    )
    for change in changes:
        after = await change
        assert after.status.engine_id == created.status.engine_id
        assert after.status.gpu_uuids == created.status.gpu_uuids
    assert await caller.shell("lives", "cut -d' ' -f22 /proc/1/stat") == start_time, "the process was not restarted"
    refused = await failure(caller.scale("lives", 2, strategy=live))
    assert (refused.reason, refused.metadata["changes"]) == ("RESTART_REQUIRED", "gpus")
    restarted = await caller.restart("lives")
    assert created.status.gpu_uuids[0] not in restarted.status.gpu_uuids
    assert len(restarted.status.gpu_uuids) == 2


async def test_a_node_without_a_driver_runs_containers_without_gpus(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start(environment={"LD_LIBRARY_PATH": "/nowhere"})
    async with Caller(daemon.target) as caller:
        node = await node_of(caller)
        assert (node.capacity.gpus, node.free_gpus, node.driver_version) == (0, 0, "")
        driver = node.components[2]
        assert driver.healthy
        assert driver.message
        assert await gpus_of(caller) == []
        created = await caller.create("plain", cpus=0.5, ports=[container_pb2.PortRequest(container_port=80)])
        assert created.status.state == RUNNING
        assert (await caller.scale("plain", cpus=1.0)).spec.cpus == 1.0
        assert (await caller.run("plain", "true")).code == 0
        exhausted = await failure(caller.scale("plain", 1))
        assert (exhausted.reason, exhausted.metadata["free"]) == ("GPU_EXHAUSTED", "0")
        await caller.delete("plain")


# -- ports -----------------------------------------------------------------------------------------------------------


async def test_a_published_port_stays_the_same_and_is_reachable_after_each_change(caller: Caller, rig: Rig) -> None:
    serve = ("sh", "-c", "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp")
    ports = [
        container_pb2.PortRequest(container_port=80),
        container_pb2.PortRequest(container_port=53, protocol=UDP),
        container_pb2.PortRequest(container_port=81, host_port=20777),
    ]
    created = await caller.create("web", 1, command=serve, ports=ports)
    published = {(port.container_port, port.protocol): port.host_port for port in created.status.ports}
    assert published[81, TCP] == 20777
    listed = await caller.nodes.ListPorts(node_service_pb2.ListPortsRequest())
    claims = {(port.container_port, port.protocol): port for port in listed.ports}
    assert {key: claim.host_port for key, claim in claims.items()} == published
    for claim in claims.values():
        assert (claim.container, claim.container_uid) == ("web", created.uid)
    assert listed.range.claimed_ports == 3
    assert (listed.range.free_tcp_ports, listed.range.free_udp_ports) == (9998, 9999)
    await _check_http_answer(rig, published[80, TCP])
    scaled = await caller.scale("web", 2)
    assert [port.host_port for port in scaled.status.ports] == [port.host_port for port in created.status.ports]
    await _check_http_answer(rig, published[80, TCP])
    await caller.stop("web")
    assert not (await caller.nodes.ListPorts(node_service_pb2.ListPortsRequest())).ports
    restarted = await caller.start("web")
    assert [port.host_port for port in restarted.status.ports] == [port.host_port for port in created.status.ports]
    await _check_http_answer(rig, published[80, TCP])


async def _check_http_answer(rig: Rig, port: int) -> None:
    script = f"until busybox wget -qO- http://127.0.0.1:{port} 2>/dev/null; do sleep 0.05; done"
    answer = await asyncio.to_thread(rig.run, "timeout", f"{limit(10):.0f}", "sh", "-c", script)
    assert answer.stdout == "hello\n"


async def test_only_ports_that_the_operator_allows_can_be_pinned(daemons: IsolatedDaemons) -> None:
    def pinned(port: int) -> list[container_pb2.PortRequest]:
        return [container_pb2.PortRequest(container_port=80, host_port=port)]

    first = await daemons.start("--port-range", "28301-28303", "--pinned-port-ranges", "443-443,8080-8081")
    async with Caller(first.target) as caller:
        for name, port in (("tls", 443), ("web", 8081), ("ranged", 28302)):
            assert (await caller.create(name, ports=pinned(port))).status.ports[0].host_port == port
        for port in (444, 22, 8079, 8082, 28304):
            refused = await failure(caller.create("second", ports=pinned(port)))
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PORT_FORBIDDEN")
            assert refused.metadata["host_port"] == str(port)
            assert refused.metadata["allowed"] == "28301-28303,443-443,8080-8081"
        assert (await failure(caller.update("web", ports=pinned(80)))).reason == "PORT_FORBIDDEN"
    await asyncio.to_thread(first.stop)
    # A port that the operator no longer allows stays with the container that holds it.
    second = await daemons.start("--port-range", "28301-28303", after=first)
    async with Caller(second.target) as caller:
        kept = await caller.scale("tls", shm_size_bytes=1 << 20)
        assert kept.status.ports[0].host_port == 443
        await caller.stop("tls")
        assert (await failure(caller.start("tls"))).reason == "PORT_FORBIDDEN"
        # Without a pinned number, the container gets a port of the allowed range.
        await caller.update("tls", ports=[container_pb2.PortRequest(container_port=80)])
        assert (await caller.start("tls")).status.ports[0].host_port == 28301
        await caller.delete_all()


async def test_a_port_that_another_program_uses_is_skipped(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--port-range", "28201-28203")
    port = container_pb2.PortRequest(container_port=80)
    async with Caller(daemon.target) as caller:
        with ports_in_use(rig, 28201):
            assert (await caller.create("first", ports=[port])).status.ports[0].host_port == 28202
            pinned = container_pb2.PortRequest(container_port=80, host_port=28201)
            taken = await failure(caller.create("second", ports=[pinned]))
            assert (taken.code, taken.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PORT_IN_USE")
            assert taken.metadata["host_port"] == "28201"
            assert "a process outside gpudock" in taken.message
            udp = container_pb2.PortRequest(container_port=80, protocol=UDP)
            assert (await caller.create("third", ports=[udp])).status.ports[0].host_port == 28201
            assert (await caller.create("fourth", ports=[port])).status.ports[0].host_port == 28203
            exhausted = await failure(caller.create("fifth", 1, ports=[port]))
            assert (exhausted.code, exhausted.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PORT_EXHAUSTED")
            assert (exhausted.metadata["first"], exhausted.metadata["last"]) == ("28201", "28203")
            assert await caller.free_gpus() == 8, "a refused create claims nothing"
        assert (await caller.create("fifth", ports=[port])).status.ports[0].host_port == 28201
        exhausted = await failure(caller.create("sixth", ports=[port]))
        assert (exhausted.reason, exhausted.metadata["free"]) == ("PORT_EXHAUSTED", "0")
        node = await node_of(caller)
        assert (node.ports.free_tcp_ports, node.ports.free_udp_ports, node.ports.claimed_ports) == (0, 2, 4)


async def test_ports_are_listed_by_pages_and_filters(caller: Caller) -> None:
    tcp = [container_pb2.PortRequest(container_port=port) for port in range(1, 6)]
    udp = [container_pb2.PortRequest(container_port=port, protocol=UDP) for port in range(1, 4)]
    await caller.create("many", ports=[*tcp, *udp])
    await caller.create("few", ports=tcp[:2])
    all_ports = await caller.nodes.ListPorts(node_service_pb2.ListPortsRequest())
    order = [(claim.host_port, claim.protocol) for claim in all_ports.ports]
    assert len(order) == 10
    assert order == sorted(order)
    paged: list[tuple[int, int]] = []
    token = ""
    while True:
        request = node_service_pb2.ListPortsRequest(page_size=4, page_token=token)
        page = await caller.nodes.ListPorts(request)
        paged += [(claim.host_port, claim.protocol) for claim in page.ports]
        assert page.range.claimed_ports == 10, "the range counts all claims"
        token = page.next_page_token
        if not token:
            break
    assert paged == order
    only = node_service_pb2.ListPortsRequest(filter=node_service_pb2.PortFilter(protocols=[UDP], container="many"))
    assert len((await caller.nodes.ListPorts(only)).ports) == 3
    few = node_service_pb2.ListPortsRequest(filter=node_service_pb2.PortFilter(container="few"))
    assert {claim.container for claim in (await caller.nodes.ListPorts(few)).ports} == {"few"}


async def test_ports_are_published_in_the_engines_network_namespace_alone(caller: Caller) -> None:
    created = await caller.create("inside", ports=[container_pb2.PortRequest(container_port=80)])
    with socket.socket() as probe:
        probe.settimeout(1)
        assert probe.connect_ex(("127.0.0.1", created.status.ports[0].host_port)) != 0
