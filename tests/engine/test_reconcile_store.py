"""What is edited by hand in the store: claims, locks, operations and records, deleted, damaged or put elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock_server.adapters.etcd.values import encode
from gpudock_server.model.claims import GpuKey, Holder
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.store_changes import Claim, ReleaseClaim
from gpudock_server.settings.definitions import default_host_id

from tests.calls import Caller, failure
from tests.engine.drift import (
    REPAIRED,
    REPORTED,
    StoredState,
    list_drift,
    state_of,
    wait_for_drift,
    wait_for_drift_log,
    wait_for_passes,
)
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until, until_state
from tests.faults.instrumented_daemon import DIE_AT
from tests.faults.instrumented_daemon import KIND as KIND_VARIABLE
from tests.rig import Rig

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
FAILED = container_pb2.CONTAINER_STATE_FAILED
HOST = default_host_id()
QUICK = ("--orphan-grace", "0", "--reconcile-interval", "0.5")
PORT = container_pb2.PortRequest(container_port=80)


@pytest_asyncio.fixture
async def quick(daemons: IsolatedDaemons) -> AsyncIterator[Caller]:
    """Calls a daemon that compares everything every half second."""
    daemon = await daemons.start(*QUICK)
    async with Caller(daemon.target) as caller:
        yield caller
    assert daemon.running
    assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest_asyncio.fixture
async def state(daemons: IsolatedDaemons, rig: Rig) -> AsyncIterator[StoredState]:
    """What the daemon has in etcd."""
    async with state_of(daemons, rig) as state:
        yield state


@pytest.mark.deep
async def test_claims_that_were_deleted_are_made_again(quick: Caller, state: StoredState) -> None:
    made = await quick.create("keeps", 3, ports=[PORT])
    claims = (await state.store.claims(HOST)).claims
    assert len(claims) == 4
    await state.delete(*(state.keys.claim(HOST, key) for key in claims))
    for _ in range(4):
        await wait_for_drift(quick, "CLAIM_MISSING", REPAIRED, container="keeps")

    async def restored() -> bool:
        return (await state.store.claims(HOST)).claims == claims

    await until(restored)
    assert (await quick.get("keeps")) == made
    assert (await quick.scale("keeps", 4)).status.state == RUNNING


@pytest.mark.deep
async def test_a_claim_that_another_has_is_a_conflict(quick: Caller, state: StoredState) -> None:
    one = await quick.create("one", 1)
    other = await quick.create("other", 1)
    (card,), (another,) = one.status.gpu_uuids, other.status.gpu_uuids
    thief = Holder(container="other", uid=other.uid, node=one.node)
    # Its holder's record does not have it: released, and claimed again for whose record has.
    await state.put(state.keys.claim(HOST, GpuKey(card)), encode(thief))

    async def right() -> bool:
        return (await quick.holders())[card] == "one"

    await until(right)
    assert (await quick.holders())[another] == "other"
    # Its holder is of another node, of which nothing is known here.
    await state.put(state.keys.claim(HOST, GpuKey(card)), encode(thief.model_copy(update={"node": "elsewhere"})))
    finding = await wait_for_drift(quick, "CLAIM_CONFLICT", REPORTED)
    assert (finding.container, finding.other_container, finding.claim) == ("one", "other", card)
    await wait_for_passes(quick)
    assert (await quick.holders())[card] == "other", "nothing is guessed"
    assert (await quick.get("one")).status.state == RUNNING
    await state.delete(state.keys.claim(HOST, GpuKey(card)))
    await until(right)


async def test_a_claim_that_its_holder_does_not_have_is_released(quick: Caller, state: StoredState) -> None:
    made = await quick.create("some", 2)
    free = next(uuid for uuid, holder in (await quick.holders()).items() if not holder)
    await state.store.apply([Claim(HOST, GpuKey(free), Holder(container="some", uid=made.uid, node=made.node))])
    finding = await wait_for_drift(quick, "CLAIM_STALE", REPAIRED)
    assert (finding.container, finding.claim) == ("some", free)
    assert await quick.free_gpus() == 6


async def test_a_claim_that_cannot_be_read_is_held(quick: Caller, state: StoredState, rig: Rig) -> None:
    key = state.keys.claim(HOST, GpuKey(rig.gpus.uuids[0]))
    await state.put(key, b"scribble")
    finding = await wait_for_drift(quick, "RECORD_UNREADABLE", REPORTED)
    assert finding.claim == rig.gpus.uuids[0]
    made = await quick.create("rest", 7)
    assert rig.gpus.uuids[0] not in made.status.gpu_uuids
    assert (await failure(quick.create("more", 1))).reason == "GPU_EXHAUSTED"
    await state.delete(key)
    assert await quick.free_gpus() == 1


async def test_a_record_that_cannot_be_read_hides_no_other(daemons: IsolatedDaemons, state: StoredState) -> None:
    daemon = await daemons.start(*QUICK)
    async with Caller(daemon.target) as caller:
        await caller.create("damaged", 2)
        whole = await caller.create("whole", 1)
        key = state.keys.container("damaged")
        kept = await state.read(key)
        await state.put(key, b'{"schema":2,"record":{"name":"damaged"}}')
        finding = await wait_for_drift(caller, "RECORD_UNREADABLE", REPORTED)
        assert finding.container == "damaged"
        assert finding.key == key.decode()
        await wait_for_passes(caller)
    # Nor does it keep a daemon from starting.
    daemon.stop()
    daemon = await daemons.start(*QUICK, after=daemon)
    async with Caller(daemon.target) as caller:
        listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
        assert list(listed.containers) == [whole]
        for call in (caller.get("damaged"), caller.delete("damaged"), caller.create("damaged")):
            refused = await failure(call)
            assert (refused.code, refused.reason) == (grpc.StatusCode.DATA_LOSS, "RECORD_UNREADABLE")
            assert refused.metadata["key"] == key.decode()
        await wait_for_passes(caller)
        assert list((await caller.holders()).values()).count("damaged") == 2, "what it holds is not given away"
        await state.put(key, kept)
        await wait_for_passes(caller)
        assert (await caller.get("damaged")).status.state == RUNNING
        assert (await caller.scale("damaged", 3)).status.state == RUNNING
        assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest.mark.deep
async def test_a_record_that_was_deleted_is_written_again(quick: Caller, state: StoredState) -> None:
    made = await quick.create("again", 2, ports=[PORT], env={"A": "b"}, cpus=0.5)
    scaled = await quick.scale("again", 3)
    await quick.shell("again", "echo kept > /file")
    await state.delete(state.keys.container("again"))

    async def back() -> bool:
        listed = await quick.containers.ListContainers(container_service_pb2.ListContainersRequest())
        return [container.name for container in listed.containers] == ["again"]

    await until(back)
    finding = await wait_for_drift(quick, "RECORD_LOST", REPAIRED)
    assert finding.container == "again"
    seen = await quick.get("again")
    assert (seen.uid, seen.spec, seen.revision) == (made.uid, scaled.spec, 2)
    assert (seen.status.gpu_uuids, seen.status.ports) == (scaled.status.gpu_uuids, scaled.status.ports)
    assert list((await quick.holders()).values()).count("again") == 3
    assert len(await state.store.history(made.uid)) == 2
    assert (await quick.scale("again", 1)).revision == 3
    assert await quick.shell("again", "cat /file") == "kept\n"
    await quick.delete("again")
    await wait_for_passes(quick)
    assert (await failure(quick.get("again"))).reason == "CONTAINER_NOT_FOUND"
    assert await quick.free_gpus() == 8


@pytest.mark.deep
async def test_a_revision_whose_record_was_deleted_is_recorded_again(
    daemons: IsolatedDaemons, state: StoredState
) -> None:
    daemon = await daemons.start(*QUICK)
    async with Caller(daemon.target) as caller:
        made = await caller.create("past", 1)
        await caller.shell("past", "echo kept > /file")
        await caller.scale("past", 2)
        before, _ = await caller.revisions("past")
        await wait_for_passes(caller)
        await state.delete(state.keys.container_revision(made.uid, 1), state.keys.container_snapshot(made.uid, 1))
        assert [revision.revision for revision in await caller.revisions("past")] == [2]
        # A history is compared with the revision backups when its container has changed.
        await caller.scale("past", cpus=0.5)
        await wait_for_drift_log(daemon, "REVISION_RECORD_LOST", "past")

        async def back() -> bool:
            return (await caller.revisions("past"))[0] == before

        await until(back)
        await caller.rollback("past", 1)
        assert await caller.shell("past", "cat /file") == "kept\n"


@pytest.mark.deep
async def test_a_record_is_not_written_again_over_what_another_holds(quick: Caller, state: StoredState) -> None:
    await quick.create("lost", 1)
    claims = (await state.store.claims(HOST)).claims
    (key,) = claims
    uid = claims[key].uid
    other = Holder(container="other", uid="u", node="elsewhere")
    await state.delete(state.keys.container("lost"))
    await state.store.apply([ReleaseClaim(HOST, key, uid)])
    await state.put(state.keys.claim(HOST, key), encode(other))
    finding = await wait_for_drift(quick, "RECORD_LOST")
    if finding.remedy == REPORTED:
        assert finding.other_container == "other"
        await state.delete(state.keys.claim(HOST, key))
    await until_state_or_missing(quick, "lost")
    assert (await state.store.claims(HOST)).claims[key].uid == uid


async def until_state_or_missing(caller: Caller, name: str) -> None:
    """Wait until there is a container of that name, and it runs."""

    async def there() -> bool:
        listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
        return [container.name for container in listed.containers if container.status.state == RUNNING] == [name]

    await until(there)


async def test_a_lock_of_no_operation_is_released(quick: Caller, state: StoredState) -> None:
    await quick.create("locked", 1)
    await state.put(state.keys.lock(ResourceKind.CONTAINER, "locked"), b"00000000-0000-8000-8000-000000000000")
    await state.put(state.keys.lock(ResourceKind.CONTAINER, "nothing"), b"\xff")
    await wait_for_drift(quick, "LOCK_STALE", REPAIRED)

    async def free() -> bool:
        return not await state.store.list_locks()

    await until(free)
    assert (await quick.scale("locked", 2)).status.state == RUNNING


async def _interrupted(daemons: IsolatedDaemons, kind: str, die_at: int) -> None:
    """A daemon is killed in the middle of an operation on `victim`."""
    daemon = await daemons.start(
        *QUICK, module="tests.faults.instrumented_daemon", environment={KIND_VARIABLE: kind, DIE_AT: str(die_at)}
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
async def test_an_operation_that_lost_its_lock_is_taken_up_all_the_same(
    daemons: IsolatedDaemons, state: StoredState
) -> None:
    await _interrupted(daemons, "SCALE", 5)
    await state.delete(state.keys.lock(ResourceKind.CONTAINER, "victim"))
    daemon = await daemons.start(*QUICK)
    async with Caller(daemon.target) as caller:
        assert "locks restored; the operation continues" in await wait_for_drift_log(daemon, "LOCK_MISSING", "victim")
        await caller.until_idle()
        assert (await caller.get("victim")).spec.gpus.count == 2
        assert await caller.shell("victim", "cat /file") == "kept\n"
        assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest.mark.deep
async def test_an_operation_that_was_deleted_loses_nothing(daemons: IsolatedDaemons, state: StoredState) -> None:
    await _interrupted(daemons, "SCALE", 5)
    (operation,) = await state.store.unfinished(daemons.node)
    await state.delete(state.keys.operation(operation.value.id))
    daemon = await daemons.start(*QUICK)
    async with Caller(daemon.target) as caller:
        # Which of the two has the files cannot be told, so both are kept, and a person is told.
        finding = await wait_for_drift(caller, "CONTAINER_UNKNOWN", REPORTED)
        assert finding.container == "victim"
        await wait_for_passes(caller)
        assert [finding.plan for finding in await list_drift(caller, container="victim")] == ["no automatic repair"]
        assert not await state.store.list_locks()
        assert "Traceback" not in daemon.log_text, daemon.log_text


async def test_a_create_whose_operation_was_deleted(daemons: IsolatedDaemons, state: StoredState) -> None:
    await _interrupted(daemons, "CREATE", 2)
    (operation,) = await state.store.unfinished(daemons.node)
    await state.delete(state.keys.operation(operation.value.id))
    daemon = await daemons.start(*QUICK)
    async with Caller(daemon.target) as caller:
        assert "is CREATING and has no operation" in await wait_for_drift_log(daemon, "CREATION_LOST", "victim")
        await until_state(caller, "victim", FAILED)
        assert await caller.free_gpus() == 8
        await caller.delete("victim")
        assert (await caller.create("victim", 1)).status.state == RUNNING


@pytest.mark.deep
async def test_a_head_that_was_deleted_under_its_operation(daemons: IsolatedDaemons, state: StoredState) -> None:
    await _interrupted(daemons, "SCALE", 5)
    await state.delete(state.keys.container("victim"))
    daemon = await daemons.start(*QUICK)
    async with Caller(daemon.target) as caller:
        await wait_for_drift(caller, "CONTAINER_UNKNOWN", REPORTED)
        await caller.until_idle()
        await wait_for_passes(caller)
        assert len(await list_drift(caller, container="victim")) == 2, "both engine containers are kept, and shown"
        assert "Traceback" not in daemon.log_text, daemon.log_text
