"""The capacity of the node as a limit of the spec of a container."""

from __future__ import annotations

import grpc
import pytest
from gpudock.v1 import container_pb2, container_service_pb2, node_service_pb2

from tests.calls import Caller, failure_of, progress_of


async def test_a_spec_beyond_the_capacity_of_the_node_is_invalid(caller: Caller) -> None:
    node = (await caller.nodes.GetNode(node_service_pb2.GetNodeRequest())).node
    cpus, memory = node.capacity.cpus, node.capacity.memory_bytes
    spec = caller.spec(
        image="UPPER/x",
        cpus=cpus + 1,
        memory_bytes=memory + 1,
        shm_size_bytes=2**63 - 1,
        mounts=[container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(), target="/proc")],
    )
    for validate_only in (True, False):
        request = container_service_pb2.CreateContainerRequest(name="large", spec=spec, validate_only=validate_only)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await progress_of(caller.containers.CreateContainer(request))
        failure = failure_of(refused.value)
        assert failure.reason == "INVALID_ARGUMENT"
        assert failure.violations == (
            "spec.image",
            "spec.cpus",
            "spec.memory_bytes",
            "spec.shm_size_bytes",
            "spec.mounts[0].target",
        )
    # A container may have the whole capacity.
    await caller.create("all", cpus=float(cpus), memory_bytes=memory, shm_size_bytes=memory)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await caller.update("all", "cpus", cpus=cpus + 1)
    assert failure_of(refused.value).violations == ("spec.cpus",)
