"""A full store: how much a change writes, and what the daemon and its callers do when the store is full."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from gpudock.v1 import node_pb2, node_service_pb2, operation_pb2, operation_service_pb2

from tests.calls import Caller, Failure, failure_of, progress_of, scale_request, update_request
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.rig import Rig
from tests.rig.etcd import Etcd
from tests.rig.etcd_filler import EtcdFiller
from tests.rig.patience import limit

__all__ = ["daemons"]

_QUOTA = 16 << 20
_LABELS_BYTES = 60 << 10
_ANSWER_SECONDS = 40.0


def _labels(number: int) -> dict[str, str]:
    """60 KiB of labels, different for each number."""
    return {f"label-{index}": f"{number:08}" * 128 for index in range(_LABELS_BYTES >> 10)}


@pytest.fixture
def small_etcd(rig: Rig) -> Iterator[Etcd]:
    etcd = rig.small_etcd(_QUOTA)
    yield etcd
    etcd.stop()


@pytest_asyncio.fixture
async def filler(small_etcd: Etcd) -> AsyncIterator[EtcdFiller]:
    async with EtcdFiller(small_etcd.endpoint) as filler:
        yield filler


async def _refusal(stream: Any) -> Failure:
    """The error of an operation's stream that must fail within a time that a caller would wait."""
    async with asyncio.timeout(limit(_ANSWER_SECONDS)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await progress_of(stream)
    return failure_of(refused.value)


async def _done(call: Awaitable[object]) -> bool:
    """Whether a call succeeded; False if the store was full."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if failure_of(error).reason != "STORE_FULL":
            raise
        return False
    return True


@pytest.mark.deep
async def test_a_change_writes_less_than_six_times_its_labels(
    daemons: IsolatedDaemons, filler: EtcdFiller, small_etcd: Etcd
) -> None:
    daemon = await daemons.start("--keep-revisions", "2", etcd_endpoints=small_etcd.endpoint)
    async with Caller(daemon.target) as caller:
        await caller.create("big", labels=_labels(0))
        # From the second update on, old revisions are pruned.
        for number in range(1, 3):
            await caller.update("big", "labels", labels=_labels(number))
        before = (await filler.status()).header.revision
        request = update_request("big", "labels", labels=_labels(3), request_id=str(uuid.uuid4()))
        first = await progress_of(caller.containers.UpdateContainer(request))
        written = await filler.bytes_put_since(before)
        assert written < 6 * _LABELS_BYTES, f"{written / _LABELS_BYTES:.1f} times the labels"
        assert len(await caller.revisions("big")) == 2
        # The same request gets the same answer; if the stored answer was deleted to free space, the current container.
        assert (await progress_of(caller.containers.UpdateContainer(request))).result == first.result
        await filler.delete_prefix(f"{daemons.prefix}results/")
        again = await progress_of(caller.containers.UpdateContainer(request))
        assert again.result == await caller.get("big")
        assert again.snapshots[-1].state == operation_pb2.OPERATION_STATE_SUCCEEDED


async def test_a_running_operation_reports_that_the_store_is_full(
    daemons: IsolatedDaemons, filler: EtcdFiller, small_etcd: Etcd
) -> None:
    async with daemons.rig.engine_proxy() as proxy:
        daemon = await daemons.start(etcd_endpoints=small_etcd.endpoint, docker_host=proxy.url)
        async with Caller(daemon.target) as caller:
            await caller.create("subject", 1)
            held = proxy.faults.hang("POST", r"/containers/.*/stop.*")
            refusal = asyncio.create_task(_refusal(caller.containers.ScaleContainer(scale_request("subject", 2))))
            await asyncio.wait_for(held.hit.wait(), limit(_ANSWER_SECONDS))
            await filler.fill()
            held.release()
            failure = await refusal
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"), failure
            # Reads are answered, and so is a watch of the operation.
            (operation,) = (
                await caller.operations.ListOperations(
                    operation_service_pb2.ListOperationsRequest(
                        filter=operation_service_pb2.OperationFilter(states=[operation_pb2.OPERATION_STATE_RUNNING])
                    )
                )
            ).operations
            watch = operation_service_pb2.WatchOperationRequest(id=operation.id)
            assert (await _refusal(caller.operations.WatchOperation(watch))).reason == "STORE_FULL"
            # The error must say that the operation has not ended: a caller would otherwise repeat the request.
            assert f"operation {operation.id} waits" in failure.message
            assert failure.metadata["operation_id"] == operation.id
            assert (await caller.get("subject")).name == "subject"
            await filler.remove()
            await caller.until_idle()
            assert len((await caller.get("subject")).status.gpu_uuids) == 2
            await caller.delete("subject")
        assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest.mark.deep
async def test_a_daemon_starts_with_a_full_store(
    daemons: IsolatedDaemons, filler: EtcdFiller, small_etcd: Etcd
) -> None:
    daemon = await daemons.start(etcd_endpoints=small_etcd.endpoint)
    async with Caller(daemon.target) as caller:
        await caller.create("kept", 1)
    await asyncio.to_thread(daemon.kill9)
    await filler.fill()
    daemon = await daemons.start(etcd_endpoints=small_etcd.endpoint, after=daemon)
    async with Caller(daemon.target) as caller:
        assert (await caller.get("kept")).name == "kept"
        failure = await _refusal(caller.containers.UpdateContainer(update_request("kept", "labels", labels={"a": "b"})))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"), failure
        node = (await caller.nodes.GetNode(node_service_pb2.GetNodeRequest())).node
        health = {component.component: component for component in node.components}[node_pb2.NODE_COMPONENT_STORE]
        assert not health.healthy
        assert "full" in health.message
        await filler.remove()
        await until(lambda: _done(caller.update("kept", "labels", labels={"a": "b"})))
        await caller.delete("kept")
    assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest.mark.deep
async def test_an_embedded_store_frees_space_by_itself(daemons: IsolatedDaemons) -> None:
    # The call waits while space is freed, which takes seconds on a busy machine.
    flags = ("--etcd-quota", str(_QUOTA), "--store-timeout", "15")
    daemon = await daemons.start(*flags, etcd_endpoints="")
    endpoint = f"unix:{daemon.state_dir}/etcd/c.sock:0"
    async with Caller(daemon.target) as caller, EtcdFiller(endpoint) as filler:
        await caller.create("kept")
        # History, which a compaction frees.
        await filler.overwrite(4 * _QUOTA)
        request_id = str(uuid.uuid4())
        request = update_request("kept", "labels", labels=_labels(1), request_id=request_id)
        first = await progress_of(caller.containers.UpdateContainer(request))
        again = await progress_of(caller.containers.UpdateContainer(request))
        assert again.result == first.result
        await filler.overwrite(4 * _QUOTA)
        await asyncio.to_thread(daemon.kill9)
    daemon = await daemons.start(*flags, after=daemon, etcd_endpoints="")
    async with Caller(daemon.target) as caller, EtcdFiller(endpoint) as filler:
        await caller.update("kept", "labels", labels=_labels(2))
        status = await filler.status()
        assert not status.errors
        assert status.dbSize < _QUOTA
        # Data, which only a deletion frees. The first fill may leave space that a compaction frees later.
        refusals = 0
        for number in range(3, 8):
            await filler.fill()
            refusals += not await _done(caller.update("kept", "labels", labels=_labels(number)))
        assert refusals, daemon.log_text[-9000:]
        await filler.remove()
        await caller.delete("kept")
    assert "Traceback" not in daemon.log_text, daemon.log_text
