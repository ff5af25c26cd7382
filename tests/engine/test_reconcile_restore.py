"""Restore of etcd's data from a backup: the engine's containers are newer than the records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2

from tests.calls import Caller, failure, progress_of
from tests.engine.drift import (
    engine_container_names,
    list_drift,
    wait_for_drift,
    wait_for_drift_log,
    wait_for_passes,
)
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.engine.store_loss import EmbeddedStoreDaemon
from tests.faults.instrumented_daemon import DIE_AT, KIND
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, require_absent, require_consistent
from tests.rig import Rig

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
FAILED = container_pb2.CONTAINER_STATE_FAILED
PORT = container_pb2.PortRequest(container_port=80)


class RestorableDaemon(EmbeddedStoreDaemon):
    """A daemon whose state can be saved and restored once."""

    def __init__(self, daemons: IsolatedDaemons, backup: Path) -> None:
        super().__init__(daemons)
        self._backup = backup

    def save(self) -> None:
        """Save the state; neither etcd nor the daemon may run."""
        self.save_state(self._backup)

    async def restart_and_save(self) -> None:
        """Stop the daemon, save its state, and start a successor."""
        await asyncio.to_thread(self.daemon.stop)
        self.save()
        await self.start()

    async def restore(self) -> None:
        """Stop the daemon, restore the saved state, and start a successor."""
        await self.restart_from(self._backup)


@pytest.fixture
def restorable(daemons: IsolatedDaemons, tmp_path: Path) -> RestorableDaemon:
    """A daemon, not started yet, whose state can be saved and restored."""
    return RestorableDaemon(daemons, tmp_path / "backup")


@pytest.mark.deep
@pytest.mark.timeout(180)
async def test_changes_since_the_backup_are_restored_from_the_engine(restorable: RestorableDaemon, rig: Rig) -> None:
    await restorable.start()
    async with Caller(restorable.daemon.target) as caller:
        await caller.create("scaled", 2, ports=[PORT])
        await caller.shell("scaled", WRITE_FILES)
        files = await caller.shell("scaled", SHOW_FILES)
        await caller.create("deleted", 1)
        await caller.create("replaced", 1)
        await caller.create("same", 1)
    await restorable.restart_and_save()
    async with Caller(restorable.daemon.target) as caller:
        await caller.scale("scaled", 1)
        scaled = await caller.scale("scaled", 3)
        await caller.delete("deleted")
        await caller.delete("replaced")
        new = await caller.create("replaced", 1)
        later = await caller.create("later", 1, ports=[PORT], env={"A": "b"})
        await caller.create("idle", 1)
        await caller.stop("idle")
        same = await caller.get("same")
    await restorable.restore()
    async with Caller(restorable.daemon.target) as caller:
        # All records are restored when the daemon begins to serve, before a GPU or port can be allocated.
        await wait_for_drift_log(restorable.daemon, "CONTAINER_NEWER", "scaled")
        container = await require_consistent(caller, rig, "scaled", files)
        assert (
            container.uid,
            container.revision,
            container.spec,
            container.status.gpu_uuids,
            container.status.ports,
        ) == (*(scaled.uid, 3, scaled.spec, scaled.status.gpu_uuids, scaled.status.ports),)
        assert container.etag != scaled.etag
        assert (await caller.get("later")).spec == later.spec
        await require_consistent(caller, rig, "later")
        assert (await caller.get("same")).status == same.status
        idle = await caller.get("idle")
        assert (idle.status.state, idle.status.holds_resources) == (STOPPED, False)
        # The backup has a record of the deleted container, which has no engine container any more.
        assert (await caller.get("deleted")).status.state == FAILED
        # The backup's container has the name of the new one. The new one is kept, and restored when the old is deleted.
        assert (await caller.get("replaced")).status.state == FAILED
        finding = await wait_for_drift(caller, "CONTAINER_UNKNOWN")
        assert (finding.container, finding.container_uid) == ("replaced", new.uid)
        await wait_for_passes(caller)
        await caller.delete("replaced")
        await wait_for_drift_log(restorable.daemon, "RECORD_LOST", "replaced")
        await require_consistent(caller, rig, "replaced")
        assert (await caller.get("replaced")).uid == new.uid
        # Every container can be changed, with the next revision number.
        assert (await caller.scale("scaled", 2)).revision == 4
        assert await caller.shell("scaled", SHOW_FILES) == files
        assert (await caller.rollback("scaled", 3, spec_only=True)).spec == scaled.spec
        assert await caller.shell("scaled", SHOW_FILES) == files
        await caller.start("idle")
        for name in ("scaled", "deleted", "replaced", "same", "later", "idle"):
            await caller.delete(name)
        await wait_for_passes(caller)
        assert await caller.free_gpus() == 8
        assert not await list_drift(caller)
        assert not [name for name in engine_container_names(rig) if name.startswith("gpudock-")]
        assert "Traceback" not in restorable.daemon.log_text, restorable.daemon.log_text


_Call: TypeAlias = Callable[[Caller], Awaitable[object]]


async def _save_during(restorable: RestorableDaemon, kind: str, die_at: int, prepare: _Call, operate: _Call) -> None:
    """Kill the daemon at a moment of an operation of a kind, and save its state."""
    await restorable.start(module="tests.faults.instrumented_daemon", environment={KIND: kind, DIE_AT: str(die_at)})
    async with Caller(restorable.daemon.target) as caller:
        await prepare(caller)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await operate(caller)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE, raised.value
    assert await asyncio.to_thread(restorable.daemon.wait) == -9, restorable.daemon.log_text
    await restorable.wait_for_etcd_exit()
    restorable.save()


async def _nothing(_: Caller) -> None:
    """No preparation."""


# `die_at` counts the moments of the operation: before its records and before its calls to the engine.
@pytest.mark.deep
@pytest.mark.timeout(180)
@pytest.mark.parametrize("die_at", range(2, 12, 2))
@pytest.mark.parametrize("later", ["ended", "scaled", "deleted"])
async def test_a_backup_from_the_middle_of_a_scale(
    restorable: RestorableDaemon, rig: Rig, die_at: int, later: str
) -> None:
    files = ""

    async def prepare(caller: Caller) -> None:
        nonlocal files
        await caller.create("victim", 2, ports=[PORT])
        await caller.shell("victim", WRITE_FILES)
        files = await caller.shell("victim", SHOW_FILES)

    await _save_during(restorable, "SCALE", die_at, prepare, lambda caller: caller.scale("victim", 3))
    await restorable.start()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await require_consistent(caller, rig, "victim", files)
        if later == "scaled":
            await caller.scale("victim", 1)
        elif later == "deleted":
            await caller.delete("victim")
    await restorable.restore()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await wait_for_passes(caller)
        if later == "deleted":
            assert (await caller.get("victim")).status.state == FAILED
            await caller.delete("victim")
            await require_absent(caller, rig, "victim")
        else:
            container = await require_consistent(caller, rig, "victim", files)
            assert container.spec.gpus.count == (1 if later == "scaled" else 3)
        assert "Traceback" not in restorable.daemon.log_text, restorable.daemon.log_text


# The moment at which a create has recorded the engine container that it made.
_ENGINE_CONTAINER_RECORDED = 5


@pytest.mark.deep
@pytest.mark.timeout(180)
@pytest.mark.parametrize("die_at", [2, 3, _ENGINE_CONTAINER_RECORDED])
@pytest.mark.parametrize("later", ["ended", "scaled", "stopped", "deleted"])
async def test_a_backup_from_the_middle_of_a_create(
    restorable: RestorableDaemon, rig: Rig, die_at: int, later: str
) -> None:
    await _save_during(restorable, "CREATE", die_at, _nothing, lambda caller: caller.create("victim", 2, ports=[PORT]))
    await restorable.start()
    files = ""
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await caller.shell("victim", WRITE_FILES)
        files = await caller.shell("victim", SHOW_FILES)
        steps: dict[str, Callable[[], Awaitable[object]]] = {
            "scaled": lambda: caller.scale("victim", 3),
            "stopped": lambda: caller.stop("victim"),
            "deleted": lambda: caller.delete("victim"),
        }
        if later in steps:
            await steps[later]()
    await restorable.restore()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await wait_for_passes(caller)
        # The interrupted create is completed, though the container was deleted later. If the create had recorded its
        # engine container, which the deletion removed, it fails and nothing is left.
        lost = later == "deleted" and die_at == _ENGINE_CONTAINER_RECORDED
        if lost:
            await require_absent(caller, rig, "victim")
        elif later == "deleted":
            await require_consistent(caller, rig, "victim")
        elif later == "stopped":
            assert (await caller.get("victim")).status.state in (RUNNING, STOPPED)
            await caller.start("victim")
            await require_consistent(caller, rig, "victim", files)
        else:
            assert (await require_consistent(caller, rig, "victim", files)).spec.gpus.count == (
                3 if later == "scaled" else 2
            )
        assert "Traceback" not in restorable.daemon.log_text, restorable.daemon.log_text
        listed = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest())
        create = [
            operation
            for operation in listed.operations
            if operation.kind == operation_pb2.OPERATION_KIND_CREATE_CONTAINER
        ]
        ended = operation_pb2.OPERATION_STATE_FAILED if lost else operation_pb2.OPERATION_STATE_SUCCEEDED
        assert [operation.state for operation in create] == [ended]


@pytest.mark.deep
@pytest.mark.timeout(120)
@pytest.mark.parametrize("die_at", [2, 3])
async def test_a_backup_from_the_middle_of_a_delete(restorable: RestorableDaemon, rig: Rig, die_at: int) -> None:
    async def prepare(caller: Caller) -> None:
        await caller.create("victim", 2, ports=[PORT])

    await _save_during(restorable, "DELETE", die_at, prepare, lambda caller: caller.delete("victim"))
    await restorable.start()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await require_absent(caller, rig, "victim")
        new = await caller.create("victim", 1)
    await restorable.restore()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await wait_for_passes(caller)
        assert (await require_consistent(caller, rig, "victim")).uid == new.uid


@pytest.mark.timeout(120)
async def test_a_backup_from_the_middle_of_a_stop(restorable: RestorableDaemon, rig: Rig) -> None:
    async def prepare(caller: Caller) -> None:
        await caller.create("victim", 2)

    await _save_during(restorable, "STOP", 2, prepare, lambda caller: caller.stop("victim"))
    await restorable.start()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await caller.start("victim", 3)
        await caller.shell("victim", WRITE_FILES)
        files = await caller.shell("victim", SHOW_FILES)
    await restorable.restore()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        # The engine container has been replaced since, with other GPUs: the stop is obsolete.
        stops = operation_service_pb2.OperationFilter(kinds=[operation_pb2.OPERATION_KIND_STOP_CONTAINER])
        request = operation_service_pb2.ListOperationsRequest(filter=stops)
        (stop,) = (await caller.operations.ListOperations(request)).operations
        assert stop.state == operation_pb2.OPERATION_STATE_FAILED
        watch = caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=stop.id))
        assert stop.error.reason == (await failure(progress_of(watch))).reason == "OPERATION_OVERTAKEN"
        assert "is obsolete" in stop.error.message
        assert "operation ended" in await wait_for_drift_log(restorable.daemon, "OPERATION_OVERTAKEN", "victim")
        await require_consistent(caller, rig, "victim", files)
