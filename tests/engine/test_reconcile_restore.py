"""etcd put back to an earlier state, by its data folder: what the engine has is newer than what the store says."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2

from tests.calls import Caller, failure, progress_of
from tests.engine.drift import (
    REPAIRED,
    engine_container_names,
    list_drift,
    wait_for_drift,
    wait_for_drift_log,
    wait_for_passes,
)
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, process_runs_in, until
from tests.faults.instrumented_daemon import DIE_AT, KIND
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, require_absent, require_consistent
from tests.rig import Daemon, Rig

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
FAILED = container_pb2.CONTAINER_STATE_FAILED
PORT = container_pb2.PortRequest(container_port=80)
QUICK = ("--orphan-grace", "0", "--reconcile-interval", "0.5")


class Restorable:
    """A daemon with an etcd of its own, whose state can be saved and put back while neither runs."""

    def __init__(self, daemons: IsolatedDaemons, saved: Path) -> None:
        self._own = daemons
        self._saved = saved
        self._daemon: Daemon | None = None

    async def start(self, module: str = "gpudock_server", environment: Mapping[str, str] | None = None) -> Daemon:
        """Start it, on the state that the one before left."""
        self._daemon = await self._own.start(
            *QUICK, after=self._daemon, etcd_endpoints="", module=module, environment=environment
        )
        return self._daemon

    @property
    def daemon(self) -> Daemon:
        """The latest."""
        assert self._daemon is not None
        return self._daemon

    async def stop(self) -> None:
        """Stop it and its etcd."""
        await asyncio.to_thread(self.daemon.stop)

    def save(self) -> None:
        """Make a backup; it must not run."""
        shutil.copytree(self.daemon.state_dir, self._saved, ignore=shutil.ignore_patterns("*.sock*"))

    def put_back(self) -> None:
        """Restore the backup; it must not run."""
        shutil.rmtree(self.daemon.state_dir)
        shutil.copytree(self._saved, self.daemon.state_dir)

    async def saved(self) -> None:
        """Stop, make a backup, start."""
        await self.stop()
        self.save()
        await self.start()

    async def restored(self) -> None:
        """Stop, restore the backup, start."""
        await self.stop()
        self.put_back()
        await self.start()


@pytest.fixture
def restorable(daemons: IsolatedDaemons, tmp_path: Path) -> Restorable:
    """A daemon whose state can be put back."""
    return Restorable(daemons, tmp_path / "saved")


@pytest.mark.deep
@pytest.mark.timeout(180)
async def test_what_has_changed_since_the_backup(restorable: Restorable, rig: Rig) -> None:
    daemon = await restorable.start()
    async with Caller(daemon.target) as caller:
        await caller.create("scaled", 2, ports=[PORT])
        await caller.shell("scaled", WRITE_FILES)
        files = await caller.shell("scaled", SHOW_FILES)
        await caller.create("deleted", 1)
        await caller.create("replaced", 1)
        await caller.create("same", 1)
    await restorable.saved()
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
    await restorable.restored()
    async with Caller(restorable.daemon.target) as caller:
        # All of this is so when it begins to serve, before anything can be given away.
        await wait_for_drift_log(restorable.daemon, "CONTAINER_NEWER", "scaled")
        seen = await require_consistent(caller, rig, "scaled", files)
        assert (seen.uid, seen.revision, seen.spec, seen.status.gpu_uuids, seen.status.ports) == (
            *(scaled.uid, 3, scaled.spec, scaled.status.gpu_uuids, scaled.status.ports),
        )
        assert seen.etag != scaled.etag
        assert (await caller.get("later")).spec == later.spec
        await require_consistent(caller, rig, "later")
        assert (await caller.get("same")).status == same.status
        idle = await caller.get("idle")
        assert (idle.status.state, idle.status.holds_resources) == (STOPPED, False)
        # Deleted is deleted: what the backup knows of it has no engine container.
        assert (await caller.get("deleted")).status.state == FAILED
        # Its name is taken by what the backup has under it; nothing is removed, and deleting that gives it back.
        assert (await caller.get("replaced")).status.state == FAILED
        finding = await wait_for_drift(caller, "CONTAINER_UNKNOWN")
        assert (finding.container, finding.container_uid) == ("replaced", new.uid)
        await wait_for_passes(caller)
        await caller.delete("replaced")
        await wait_for_drift(caller, "RECORD_LOST", REPAIRED, container="replaced")
        await require_consistent(caller, rig, "replaced")
        assert (await caller.get("replaced")).uid == new.uid
        # And everything goes on from there.
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


async def _begun(restorable: Restorable, kind: str, die_at: int, prepare: _Call, act_on: _Call) -> bool:
    """Kill the daemon at a moment of an operation and save what its store then has; whether it was killed."""
    daemon = await restorable.start("tests.faults.instrumented_daemon", {KIND: kind, DIE_AT: str(die_at)})
    async with Caller(daemon.target) as caller:
        await prepare(caller)
        try:
            await act_on(caller)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017 (any other code is the failure)
        else:
            return False
    assert await asyncio.to_thread(daemon.wait) == -9, daemon.log_text

    async def etcd_gone() -> bool:
        return not process_runs_in(daemon.state_dir)

    # It ends in order when its daemon dies.
    await until(etcd_gone)
    restorable.save()
    return True


async def _nothing(_: Caller) -> None:
    return


# Moments of the operation: before its records and its calls to the engine.
@pytest.mark.deep
@pytest.mark.timeout(180)
@pytest.mark.parametrize("die_at", range(2, 12, 2))
@pytest.mark.parametrize("then", ["ended", "scaled again", "deleted"])
async def test_a_scale_that_the_backup_has_under_way(restorable: Restorable, rig: Rig, die_at: int, then: str) -> None:
    files = ""

    async def prepare(caller: Caller) -> None:
        nonlocal files
        await caller.create("victim", 2, ports=[PORT])
        await caller.shell("victim", WRITE_FILES)
        files = await caller.shell("victim", SHOW_FILES)

    assert await _begun(restorable, "SCALE", die_at, prepare, lambda caller: caller.scale("victim", 3))
    await restorable.start()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await require_consistent(caller, rig, "victim", files)
        if then == "scaled again":
            await caller.scale("victim", 1)
        elif then == "deleted":
            await caller.delete("victim")
    await restorable.restored()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await wait_for_passes(caller)
        if then == "deleted":
            assert (await caller.get("victim")).status.state == FAILED
            await caller.delete("victim")
            await require_absent(caller, rig, "victim")
        else:
            seen = await require_consistent(caller, rig, "victim", files)
            assert seen.spec.gpus.count == (1 if then == "scaled again" else 3)
        assert "Traceback" not in restorable.daemon.log_text, restorable.daemon.log_text


# The moment at which a create has recorded the engine container that it made.
_MADE = 5


@pytest.mark.deep
@pytest.mark.timeout(180)
@pytest.mark.parametrize("die_at", [2, 3, _MADE])
@pytest.mark.parametrize("then", ["ended", "scaled", "stopped", "deleted"])
async def test_a_create_that_the_backup_has_under_way(restorable: Restorable, rig: Rig, die_at: int, then: str) -> None:
    assert await _begun(restorable, "CREATE", die_at, _nothing, lambda caller: caller.create("victim", 2, ports=[PORT]))
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
        if then in steps:
            await steps[then]()
    await restorable.restored()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await wait_for_passes(caller)
        # An interrupted operation goes forward: who asked for the container gets it, though it was deleted since. But
        # where it had made the engine container already, that is gone: then it fails, and nothing is left.
        lost = then == "deleted" and die_at == _MADE
        if lost:
            await require_absent(caller, rig, "victim")
        elif then == "deleted":
            await require_consistent(caller, rig, "victim")
        elif then == "stopped":
            assert (await caller.get("victim")).status.state in (RUNNING, STOPPED)
            await caller.start("victim")
            await require_consistent(caller, rig, "victim", files)
        else:
            assert (await require_consistent(caller, rig, "victim", files)).spec.gpus.count == (
                3 if then == "scaled" else 2
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
async def test_a_delete_that_the_backup_has_under_way(restorable: Restorable, rig: Rig, die_at: int) -> None:
    async def prepare(caller: Caller) -> None:
        await caller.create("victim", 2, ports=[PORT])

    assert await _begun(restorable, "DELETE", die_at, prepare, lambda caller: caller.delete("victim"))
    await restorable.start()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await require_absent(caller, rig, "victim")
        new = await caller.create("victim", 1)
    await restorable.restored()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await wait_for_passes(caller)
        assert (await require_consistent(caller, rig, "victim")).uid == new.uid


@pytest.mark.timeout(120)
async def test_a_stop_that_the_backup_has_under_way(restorable: Restorable, rig: Rig) -> None:
    async def prepare(caller: Caller) -> None:
        await caller.create("victim", 2)

    assert await _begun(restorable, "STOP", 2, prepare, lambda caller: caller.stop("victim"))
    await restorable.start()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        await caller.start("victim", 3)
        await caller.shell("victim", WRITE_FILES)
        files = await caller.shell("victim", SHOW_FILES)
    await restorable.restored()
    async with Caller(restorable.daemon.target) as caller:
        await caller.until_idle()
        # It was made again with other cards since: the stop was of one that is no more.
        stops = operation_service_pb2.OperationFilter(kinds=[operation_pb2.OPERATION_KIND_STOP_CONTAINER])
        request = operation_service_pb2.ListOperationsRequest(filter=stops)
        (stop,) = (await caller.operations.ListOperations(request)).operations
        assert stop.state == operation_pb2.OPERATION_STATE_FAILED
        watch = caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=stop.id))
        assert stop.error.reason == (await failure(progress_of(watch))).reason == "OPERATION_OVERTAKEN"
        assert "is obsolete" in stop.error.message
        assert "operation ended" in await wait_for_drift_log(restorable.daemon, "OPERATION_OVERTAKEN", "victim")
        await require_consistent(caller, rig, "victim", files)
