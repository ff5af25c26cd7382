"""Claims, locks, operations and records that were deleted, damaged or changed in etcd by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock_server.adapters.etcd.values import encode
from gpudock_server.model.claims import GpuKey, Holder
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.store_changes import Claim
from gpudock_server.settings.definitions import default_host_id

from tests.calls import Caller, failure
from tests.engine.drift import (
    REPORTED,
    StoredState,
    list_drift,
    state_of,
    wait_for_drift,
    wait_for_drift_log,
    wait_for_passes,
)
from tests.engine.isolated_daemons import (
    FREQUENT_RECONCILE,
    IsolatedDaemons,
    daemons,
    quick_caller,
    quick_daemon,
    until,
    until_state,
)
from tests.faults.instrumented_daemon import DIE_AT
from tests.faults.instrumented_daemon import KIND as KIND_VARIABLE
from tests.rig import Daemon, Rig

__all__ = ["daemons", "quick_caller", "quick_daemon"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
FAILED = container_pb2.CONTAINER_STATE_FAILED
HOST = default_host_id()
PORT = container_pb2.PortRequest(container_port=80)


@pytest_asyncio.fixture
async def state(daemons: IsolatedDaemons, rig: Rig) -> AsyncIterator[StoredState]:
    """The data of the daemon in etcd."""
    async with state_of(daemons, rig) as state:
        yield state


@pytest.mark.deep
async def test_deleted_claims_are_restored(quick_daemon: Daemon, quick_caller: Caller, state: StoredState) -> None:
    created = await quick_caller.create("keeps", 3, ports=[PORT])
    claims = (await state.store.claims(HOST)).claims
    assert len(claims) == 4
    await state.delete(*(state.keys.claim(HOST, key) for key in claims))
    await wait_for_drift_log(quick_daemon, "CLAIM_MISSING", "keeps")

    async def restored() -> bool:
        return (await state.store.claims(HOST)).claims == claims

    await until(restored)
    assert (await quick_caller.get("keeps")) == created
    assert (await quick_caller.scale("keeps", 4)).status.state == RUNNING


@pytest.mark.deep
async def test_a_claim_with_another_holder_is_restored_or_reported(quick_caller: Caller, state: StoredState) -> None:
    first = await quick_caller.create("one", 1)
    second = await quick_caller.create("other", 1)
    (gpu,), (second_gpu,) = first.status.gpu_uuids, second.status.gpu_uuids
    wrong_holder = Holder(container="other", uid=second.uid, node=first.node)
    # The record of the wrong holder lacks the claim: it is released, and claimed for the container whose record has it.
    await state.put(state.keys.claim(HOST, GpuKey(gpu)), encode(wrong_holder))

    async def claim_is_restored() -> bool:
        return (await quick_caller.holders())[gpu] == "one"

    await until(claim_is_restored)
    assert (await quick_caller.holders())[second_gpu] == "other"
    # The records of the wrong holder's node are not known to this daemon.
    await state.put(state.keys.claim(HOST, GpuKey(gpu)), encode(wrong_holder.model_copy(update={"node": "elsewhere"})))
    finding = await wait_for_drift(quick_caller, "CLAIM_CONFLICT", REPORTED)
    assert (finding.container, finding.other_container, finding.claim) == ("one", "other", gpu)
    await wait_for_passes(quick_caller)
    assert (await quick_caller.holders())[gpu] == "other", "a conflict is not repaired"
    assert (await quick_caller.get("one")).status.state == RUNNING
    await state.delete(state.keys.claim(HOST, GpuKey(gpu)))
    await until(claim_is_restored)


async def test_a_claim_that_is_not_in_the_record_of_its_holder_is_released(
    quick_daemon: Daemon, quick_caller: Caller, state: StoredState
) -> None:
    created = await quick_caller.create("some", 2)
    free = next(uuid for uuid, holder in (await quick_caller.holders()).items() if not holder)
    await state.store.apply([Claim(HOST, GpuKey(free), Holder(container="some", uid=created.uid, node=created.node))])
    assert free in await wait_for_drift_log(quick_daemon, "CLAIM_STALE", "some")
    assert await quick_caller.free_gpus() == 6


async def test_an_unreadable_claim_is_not_released(quick_caller: Caller, state: StoredState, rig: Rig) -> None:
    key = state.keys.claim(HOST, GpuKey(rig.gpus.uuids[0]))
    await state.put(key, b"scribble")
    finding = await wait_for_drift(quick_caller, "RECORD_UNREADABLE", REPORTED)
    assert finding.claim == rig.gpus.uuids[0]
    created = await quick_caller.create("rest", 7)
    assert rig.gpus.uuids[0] not in created.status.gpu_uuids
    assert (await failure(quick_caller.create("more", 1))).reason == "GPU_EXHAUSTED"
    await state.delete(key)
    assert await quick_caller.free_gpus() == 1


async def test_an_unreadable_record_affects_no_other_container(daemons: IsolatedDaemons, state: StoredState) -> None:
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    async with Caller(daemon.target) as caller:
        await caller.create("damaged", 2)
        intact = await caller.create("whole", 1)
        key = state.keys.container("damaged")
        record = await state.read(key)
        await state.put(key, b'{"schema":2,"record":{"name":"damaged"}}')
        finding = await wait_for_drift(caller, "RECORD_UNREADABLE", REPORTED)
        assert finding.container == "damaged"
        assert finding.key == key.decode()
        await wait_for_passes(caller)
    # A daemon starts with the unreadable record.
    daemon.stop()
    daemon = await daemons.start(*FREQUENT_RECONCILE, after=daemon)
    async with Caller(daemon.target) as caller:
        listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
        assert list(listed.containers) == [intact]
        for call in (caller.get("damaged"), caller.delete("damaged"), caller.create("damaged")):
            refused = await failure(call)
            assert (refused.code, refused.reason) == (grpc.StatusCode.DATA_LOSS, "RECORD_UNREADABLE")
            assert refused.metadata["key"] == key.decode()
        await wait_for_passes(caller)
        assert list((await caller.holders()).values()).count("damaged") == 2, "its claims are not released"
        await state.put(key, record)
        await wait_for_passes(caller)
        assert (await caller.get("damaged")).status.state == RUNNING
        assert (await caller.scale("damaged", 3)).status.state == RUNNING
        assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest.mark.deep
async def test_a_deleted_record_is_restored(quick_daemon: Daemon, quick_caller: Caller, state: StoredState) -> None:
    created = await quick_caller.create("again", 2, ports=[PORT], env={"A": "b"}, cpus=0.5)
    scaled = await quick_caller.scale("again", 3)
    await quick_caller.shell("again", "echo kept > /file")
    await state.delete(state.keys.container("again"))

    async def is_restored() -> bool:
        listed = await quick_caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
        return [container.name for container in listed.containers] == ["again"]

    await until(is_restored)
    await wait_for_drift_log(quick_daemon, "RECORD_LOST", "again")
    restored_container = await quick_caller.get("again")
    assert (restored_container.uid, restored_container.spec, restored_container.revision) == (
        created.uid,
        scaled.spec,
        2,
    )
    assert (restored_container.status.gpu_uuids, restored_container.status.ports) == (
        scaled.status.gpu_uuids,
        scaled.status.ports,
    )
    assert list((await quick_caller.holders()).values()).count("again") == 3
    assert len(await state.store.history(created.uid)) == 2
    assert (await quick_caller.scale("again", 1)).revision == 3
    assert await quick_caller.shell("again", "cat /file") == "kept\n"
    await quick_caller.delete("again")
    await wait_for_passes(quick_caller)
    assert (await failure(quick_caller.get("again"))).reason == "CONTAINER_NOT_FOUND"
    assert await quick_caller.free_gpus() == 8


@pytest.mark.deep
async def test_the_deleted_record_of_a_revision_is_restored(daemons: IsolatedDaemons, state: StoredState) -> None:
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    async with Caller(daemon.target) as caller:
        created = await caller.create("past", 1)
        await caller.shell("past", "echo kept > /file")
        await caller.scale("past", 2)
        before, _ = await caller.revisions("past")
        await wait_for_passes(caller)
        await state.delete(state.keys.container_revision(created.uid, 1), state.keys.container_snapshot(created.uid, 1))
        assert [revision.revision for revision in await caller.revisions("past")] == [2]
        # A history is compared with the revision backups when its container has changed.
        await caller.scale("past", cpus=0.5)
        await wait_for_drift_log(daemon, "REVISION_RECORD_LOST", "past")

        async def is_restored() -> bool:
            return (await caller.revisions("past"))[0] == before

        await until(is_restored)
        await caller.rollback("past", 1)
        assert await caller.shell("past", "cat /file") == "kept\n"


@pytest.mark.deep
async def test_a_record_is_not_restored_while_another_container_holds_its_claim(
    quick_daemon: Daemon, quick_caller: Caller, state: StoredState
) -> None:
    await quick_caller.create("lost", 1)
    ((key, holder),) = (await state.store.claims(HOST)).claims.items()
    second = Holder(container="other", uid="u", node="elsewhere")
    # The daemon must not restore the record before the claim has another holder.
    quick_daemon.process.pause()
    await state.delete(state.keys.container("lost"))
    await state.put(state.keys.claim(HOST, key), encode(second))
    quick_daemon.process.resume()
    finding = await wait_for_drift(quick_caller, "RECORD_LOST", REPORTED)
    assert finding.other_container == "other"
    await state.delete(state.keys.claim(HOST, key))
    await wait_for_restored_record(quick_caller, "lost")
    assert (await state.store.claims(HOST)).claims[key].uid == holder.uid


async def wait_for_restored_record(caller: Caller, name: str) -> None:
    """Wait until a container of a name, and no other, is listed and RUNNING."""

    async def is_running() -> bool:
        listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
        return [container.name for container in listed.containers if container.status.state == RUNNING] == [name]

    await until(is_running)


async def test_a_lock_without_an_operation_is_released(
    quick_daemon: Daemon, quick_caller: Caller, state: StoredState
) -> None:
    await quick_caller.create("locked", 1)
    await state.put(state.keys.lock(ResourceKind.CONTAINER, "locked"), b"00000000-0000-8000-8000-000000000000")
    await state.put(state.keys.lock(ResourceKind.CONTAINER, "nothing"), b"\xff")
    await wait_for_drift_log(quick_daemon, "LOCK_STALE", "locked")

    async def free() -> bool:
        return not await state.store.list_locks()

    await until(free)
    assert (await quick_caller.scale("locked", 2)).status.state == RUNNING


async def _kill_during_operation(daemons: IsolatedDaemons, kind: str, die_at: int) -> None:
    """Kill a daemon at a moment of an operation on `victim`."""
    daemon = await daemons.start(
        *FREQUENT_RECONCILE,
        module="tests.faults.instrumented_daemon",
        environment={KIND_VARIABLE: kind, DIE_AT: str(die_at)},
    )
    async with Caller(daemon.target) as caller:
        try:
            await caller.create("victim", 1)
            await caller.shell("victim", "echo kept > /file")
            await caller.scale("victim", 2)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 (any other code is the failure)
    assert daemon.wait() == -9, daemon.log_text


@pytest.mark.deep
async def test_an_operation_without_its_lock_is_resumed(daemons: IsolatedDaemons, state: StoredState) -> None:
    await _kill_during_operation(daemons, "SCALE", 5)
    await state.delete(state.keys.lock(ResourceKind.CONTAINER, "victim"))
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    async with Caller(daemon.target) as caller:
        assert "locks restored; the operation continues" in await wait_for_drift_log(daemon, "LOCK_MISSING", "victim")
        await caller.until_idle()
        assert (await caller.get("victim")).spec.gpus.count == 2
        assert await caller.shell("victim", "cat /file") == "kept\n"
        assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest.mark.deep
async def test_a_deleted_scale_operation_keeps_both_engine_containers(
    daemons: IsolatedDaemons, state: StoredState
) -> None:
    await _kill_during_operation(daemons, "SCALE", 5)
    (operation,) = await state.store.unfinished(daemons.node)
    await state.delete(state.keys.operation(operation.value.id))
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    async with Caller(daemon.target) as caller:
        # Which of the two engine containers has the files is not known, so both are kept and reported.
        finding = await wait_for_drift(caller, "CONTAINER_UNKNOWN", REPORTED)
        assert finding.container == "victim"
        await wait_for_passes(caller)
        assert [finding.plan for finding in await list_drift(caller, container="victim")] == ["no automatic repair"]
        assert not await state.store.list_locks()
        assert "Traceback" not in daemon.log_text, daemon.log_text


async def test_a_container_whose_create_operation_was_deleted_is_failed(
    daemons: IsolatedDaemons, state: StoredState
) -> None:
    await _kill_during_operation(daemons, "CREATE", 2)
    (operation,) = await state.store.unfinished(daemons.node)
    await state.delete(state.keys.operation(operation.value.id))
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    async with Caller(daemon.target) as caller:
        assert "is CREATING and has no operation" in await wait_for_drift_log(daemon, "CREATION_LOST", "victim")
        await until_state(caller, "victim", FAILED)
        assert await caller.free_gpus() == 8
        await caller.delete("victim")
        assert (await caller.create("victim", 1)).status.state == RUNNING


@pytest.mark.deep
async def test_a_record_that_was_deleted_during_its_operation_is_reported(
    daemons: IsolatedDaemons, state: StoredState
) -> None:
    await _kill_during_operation(daemons, "SCALE", 5)
    await state.delete(state.keys.container("victim"))
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    async with Caller(daemon.target) as caller:
        await wait_for_drift(caller, "CONTAINER_UNKNOWN", REPORTED)
        await caller.until_idle()
        await wait_for_passes(caller)
        assert len(await list_drift(caller, container="victim")) == 2, "both engine containers are kept and reported"
        assert "Traceback" not in daemon.log_text, daemon.log_text
