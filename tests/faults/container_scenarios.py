"""The operations on containers during which daemons are killed, and what must be true afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from gpudock.v1 import container_pb2, container_service_pb2, operation_pb2, operation_service_pb2

from tests.calls import IMAGE, Caller
from tests.faults.daemon_killer import KillScenario
from tests.faults.invariants import (
    SHOW_FILES,
    WRITE_FILES,
    bound_host_paths,
    engine_containers,
    layer_images,
    require_absent,
    require_consistent,
)
from tests.rig import GLIBC, Rig

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
PAUSED = container_pb2.CONTAINER_STATE_PAUSED
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
EXITED = container_pb2.CONTAINER_STATE_EXITED
FAILED = container_pb2.CONTAINER_STATE_FAILED
# The image that a commit makes.
COMMITTED = "gpudock/subject:test"
_PORT = container_pb2.PortRequest(container_port=80)

ScenarioFactory = Callable[[Rig, Path], KillScenario]


async def _get_or_none(caller: Caller, name: str = "subject") -> container_pb2.Container | None:
    try:
        return await caller.get(name)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND, error  # noqa: PT017 - any other code fails the test
        return None


async def _create_with_files(caller: Caller, name: str = "subject", gpus: int = 2, **fields: Any) -> str:
    """Create a container with files; return what SHOW_FILES prints."""
    await caller.create(name, gpus, ports=[_PORT], **fields)
    await caller.shell(name, WRITE_FILES)
    return await caller.shell(name, SHOW_FILES)


async def _require_free(caller: Caller, rig: Rig, count: int) -> None:
    await require_absent(caller, rig, "subject")
    assert await caller.free_gpus() == count


async def _require_stopped_or_consistent(caller: Caller, rig: Rig, files: str) -> int:
    """Assert that `subject` runs and is consistent, or is stopped; returns its state."""
    container = await caller.get("subject")
    if container.status.state == RUNNING:
        await require_consistent(caller, rig, "subject", files)
    else:
        assert container.status.state in (STOPPED, EXITED), container.status
        (engine,) = engine_containers(rig)
        assert not engine["State"]["Running"]
        held = list((await caller.holders()).values()).count("subject")
        assert held == (container.spec.gpus.count if container.status.holds_resources else 0)
    return container.status.state


def create(rig: Rig, folder: Path) -> KillScenario:
    """Create a container with GPUs, a port and a host path."""
    left = bound_host_paths(rig)  # of killed daemons of other tests
    mount = container_pb2.Mount(host_path=str(folder), target="/host")

    async def act(caller: Caller) -> None:
        await caller.create("subject", 2, ports=[_PORT], mounts=[mount])

    async def check(caller: Caller) -> None:
        if await _get_or_none(caller) is None:
            await _require_free(caller, rig, 8)
        else:
            await require_consistent(caller, rig, "subject")
            assert len(bound_host_paths(rig)) == len(left) + 1
            await caller.delete("subject")
        assert bound_host_paths(rig) == left

    return KillScenario("CREATE", act, check, ("--allowed-host-paths", str(folder)))


def scale(rig: Rig, folder: Path, *, carry: str) -> KillScenario:
    """Scale to other GPUs and back; the files are kept."""
    files, left = "", bound_host_paths(rig)
    mounts = [container_pb2.Mount(host_path=str(folder), target="/host")] if carry == "exchange" else []

    async def act(caller: Caller) -> None:
        nonlocal files
        files = files or await _create_with_files(caller, mounts=mounts)
        now = (await caller.get("subject")).spec.gpus.count
        await caller.scale("subject", 3 if now == 2 else 2)

    async def check(caller: Caller) -> None:
        await require_consistent(caller, rig, "subject", files)
        assert len(bound_host_paths(rig)) == len(left) + len(mounts)

    return KillScenario("SCALE", act, check, ("--layer-carry", carry, "--allowed-host-paths", str(folder)))


def rollback(rig: Rig, _folder: Path) -> KillScenario:
    """Roll back between two revisions with different files; older revisions are pruned meanwhile."""
    files: dict[int, str] = {}

    async def act(caller: Caller) -> None:
        if not files:
            files[2] = await _create_with_files(caller)
            await caller.scale("subject", 3)
            await caller.shell("subject", "echo other > /work/file; rm /work/deep/data; touch /work/deep/data")
            files[3] = await caller.shell("subject", SHOW_FILES)
        now = (await caller.get("subject")).spec.gpus.count
        others = [revision for revision in await caller.revisions("subject") if revision.spec.gpus.count != now]
        await caller.rollback("subject", max(revision.revision for revision in others if revision.HasField("snapshot")))

    async def check(caller: Caller) -> None:
        count = (await caller.get("subject")).spec.gpus.count
        await require_consistent(caller, rig, "subject", files[count])
        history = await caller.revisions("subject")
        assert len(history) <= 4
        assert all(revision.HasField("snapshot") != revision.current for revision in history)

    return KillScenario("ROLLBACK", act, check, ("--keep-revisions", "4"))


def clone(rig: Rig, _folder: Path, *, carry: str) -> KillScenario:
    """Clone the current files of a running container, which is paused meanwhile and must run afterwards."""
    others = layer_images(rig)
    files = ""

    async def act(caller: Caller) -> None:
        nonlocal files
        files = files or await _create_with_files(caller, "source")
        await caller.clone("source", "subject")

    async def check(caller: Caller) -> None:
        await require_consistent(caller, rig, "source", files)
        if await _get_or_none(caller) is None:
            await _require_free(caller, rig, 6)
        else:
            await require_consistent(caller, rig, "subject", files)
            await caller.delete("subject")
        assert layer_images(rig) == others

    return KillScenario("CLONE", act, check, ("--layer-carry", carry))


def clone_of_revision(rig: Rig, _folder: Path, *, carry: str) -> KillScenario:
    """Clone the files of a revision, which are a snapshot, or with `carry` commit an image."""
    others = layer_images(rig)
    files = ""

    async def act(caller: Caller) -> None:
        nonlocal files
        if not files:
            files = await _create_with_files(caller, "source", 1)
            await caller.scale("source", 2)
            await caller.shell("source", "rm -r /work")
        await caller.clone("source", "subject", revision=1)

    async def check(caller: Caller) -> None:
        assert (await caller.get("source")).revision == 2
        await require_consistent(caller, rig, "source")
        if await _get_or_none(caller) is None:
            await _require_free(caller, rig, 6)
        else:
            await require_consistent(caller, rig, "subject", files)
            await caller.delete("subject")
        assert len(layer_images(rig) - others) == (1 if carry == "commit" else 0)

    return KillScenario("CLONE", act, check, ("--layer-carry", carry))


def update(rig: Rig, _folder: Path, *, field: str) -> KillScenario:
    """Update by a successor (env), in place with a short pause (labels), or to another image."""
    files = ""
    values: dict[str, tuple[Any, Any]] = {
        "env": ({}, {"a": "b"}),
        "labels": ({}, {"a": "b"}),
        "image": (IMAGE, GLIBC),
    }

    async def act(caller: Caller) -> None:
        nonlocal files
        files = files or await _create_with_files(caller, gpus=1)
        now = getattr((await caller.get("subject")).spec, field)
        first, second = values[field]
        value = second if now == first else first
        await caller.update("subject", field, **{field: value}, files=container_service_pb2.FILES_POLICY_CARRY_COMMIT)

    async def check(caller: Caller) -> None:
        await require_consistent(caller, rig, "subject", files)

    return KillScenario("UPDATE", act, check)


def stop(rig: Rig, _folder: Path) -> KillScenario:
    """Stop with a snapshot of the files."""
    files = ""

    async def act(caller: Caller) -> None:
        nonlocal files
        files = files or await _create_with_files(caller)
        await caller.stop("subject")

    async def check(caller: Caller) -> None:
        if await _require_stopped_or_consistent(caller, rig, files) != RUNNING:
            await caller.start("subject")
            await require_consistent(caller, rig, "subject", files)

    return KillScenario("STOP", act, check, ("--snapshot-on-stop", "true"))


def stop_paused(rig: Rig, _folder: Path) -> KillScenario:
    """Stop a paused container. It is unpaused first; the next daemon may do that when it has ended already."""
    made = False

    async def act(caller: Caller) -> None:
        nonlocal made
        if not made:
            await caller.create("subject", 2, ports=[_PORT])
            made = True
        if (await caller.get("subject")).status.state in (STOPPED, EXITED):
            await caller.start("subject")
        if (await caller.get("subject")).status.state != PAUSED:
            await caller.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name="subject"))
        await caller.stop("subject", keep_resources=True)

    async def check(caller: Caller) -> None:
        state = (await caller.get("subject")).status.state
        # EXITED if the container had ended before the undo.
        assert state in (PAUSED, STOPPED, EXITED), state
        (engine,) = engine_containers(rig)
        assert engine["State"]["Paused"] == (state == PAUSED)
        assert engine["State"]["Running"] == (state == PAUSED)
        assert await caller.free_gpus() == 6

    return KillScenario("STOP", act, check)


def start(rig: Rig, _folder: Path, *, gpus: str) -> KillScenario:
    """Start with the same GPUs, or with others in a new engine container."""
    files = ""

    async def act(caller: Caller) -> None:
        nonlocal files
        files = files or await _create_with_files(caller)
        container = await caller.get("subject")
        if container.status.state == RUNNING:
            await caller.stop("subject")
        now = container.spec.gpus.count
        await caller.start("subject", None if gpus == "same" else 5 - now)

    async def check(caller: Caller) -> None:
        await _require_stopped_or_consistent(caller, rig, files)

    return KillScenario("START", act, check)


def restart(rig: Rig, _folder: Path) -> KillScenario:
    """Restart; the container runs in the end, whether the operation is completed or undone."""
    files = ""

    async def act(caller: Caller) -> None:
        nonlocal files
        files = files or await _create_with_files(caller)
        await caller.restart("subject")

    async def check(caller: Caller) -> None:
        await require_consistent(caller, rig, "subject", files)

    return KillScenario("RESTART", act, check)


async def _set_paused(caller: Caller, *, paused: bool) -> None:
    """Pause or unpause `subject`, unless it is in that state."""
    container = await _get_or_none(caller)
    if container is None:
        container = await caller.create("subject", 2, ports=[_PORT])
    if (container.status.state == PAUSED) == paused:
        return
    if paused:
        await caller.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name="subject"))
    else:
        await caller.containers.UnpauseContainer(container_service_pb2.UnpauseContainerRequest(name="subject"))


def _pause_or_unpause(rig: Rig, _folder: Path, *, kind: str) -> KillScenario:
    pauses = kind == "PAUSE"

    async def act(caller: Caller) -> None:
        await _set_paused(caller, paused=not pauses)
        await _set_paused(caller, paused=pauses)

    async def check(caller: Caller) -> None:
        state = (await caller.get("subject")).status.state
        assert state in (RUNNING, PAUSED), state
        (engine,) = engine_containers(rig)
        assert engine["State"]["Running"]
        assert engine["State"]["Paused"] == (state == PAUSED), "the engine's state differs from the record"
        assert list((await caller.holders()).values()).count("subject") == 2

    return KillScenario(kind, act, check)


def delete(rig: Rig, _folder: Path) -> KillScenario:
    """Delete a container with snapshots and layer images. If the deletion fails, the same call can complete it."""
    others, uid = layer_images(rig), ""

    async def act(caller: Caller) -> None:
        nonlocal uid
        container = await _get_or_none(caller)
        if container is None:
            container = await caller.create("subject", 2, ports=[_PORT])
            await caller.shell("subject", WRITE_FILES)
            await caller.scale("subject", 3)
        uid = container.uid
        await caller.delete("subject")

    async def check(caller: Caller) -> None:
        container = await _get_or_none(caller)
        if container is None:
            await _require_free(caller, rig, 8)
            assert not list(_snapshots(rig).glob(f"*/{uid}/*")), "snapshots of the deleted container are left"
            assert layer_images(rig) == others
        elif container.status.state == RUNNING:
            await require_consistent(caller, rig, "subject")
        else:
            assert container.status.state == FAILED, container.status
            assert not container.status.operation_id
            assert container.status.engine_id not in {inspected["Id"] for inspected in engine_containers(rig)}

    return KillScenario("DELETE", act, check)


def delete_revision(rig: Rig, _folder: Path, *, carry: str) -> KillScenario:
    """Delete a revision. The files of the other revisions are kept, and the container is unchanged."""
    others, files = layer_images(rig), ""

    async def act(caller: Caller) -> None:
        nonlocal files
        files = files or await _create_with_files(caller)
        old = [revision for revision in await caller.revisions("subject") if not revision.current]
        if not old:
            now = (await caller.get("subject")).spec.gpus.count
            await caller.scale("subject", 5 - now)
            old = [revision for revision in await caller.revisions("subject") if not revision.current]
        await caller.delete_revision("subject", old[0].revision)

    async def check(caller: Caller) -> None:
        container = await require_consistent(caller, rig, "subject", files)
        old = {revision.revision for revision in await caller.revisions("subject") if not revision.current}
        on_disk = {path.parent.name for path in _snapshots(rig).glob(f"*/{container.uid}/*/meta.json")}
        assert {int(number) for number in on_disk} <= old
        if carry == "commit":
            # The current revision has layer images, too.
            assert len(layer_images(rig) - others) >= len(old)

    return KillScenario("DELETE_REVISION", act, check, ("--layer-carry", carry))


def _snapshots(rig: Rig) -> Path:
    """The folder of all snapshots, `NODE/UID/REVISION`."""
    return rig.engine.data_root / "gpudock/snapshots"


def commit(rig: Rig, _folder: Path) -> KillScenario:
    """Commit to a name that has an image. Afterwards it names the old or the new image, as the operation reports."""
    named = ""

    async def act(caller: Caller) -> None:
        if await _get_or_none(caller) is None:
            await caller.create("subject", 2, ports=[_PORT])
            await caller.shell("subject", "echo kept > /kept")
        await caller.commit("subject", "gpudock/subject", tag="test")

    async def check(caller: Caller) -> None:
        nonlocal named
        await require_consistent(caller, rig, "subject")
        request = operation_service_pb2.ListOperationsRequest(page_size=1)
        (last,) = (await caller.operations.ListOperations(request)).operations
        images = rig.engine.image_ids()
        assert not [tag for tag in images if tag.startswith(("gpudock/raw:", "gpudock/commit:"))]
        if last.kind != operation_pb2.OPERATION_KIND_COMMIT_CONTAINER:
            return
        if last.state == operation_pb2.OPERATION_STATE_FAILED:
            assert last.error.reason == "ENGINE_REJECTED", last
            assert images.get(COMMITTED, "") == named
            return
        # A commit that has begun is completed by the next daemon.
        assert last.state == operation_pb2.OPERATION_STATE_SUCCEEDED, last
        watch = operation_service_pb2.WatchOperationRequest(id=last.id)
        answers = [answer async for answer in caller.operations.WatchOperation(watch)]
        assert images[COMMITTED] == answers[-1].result.image.id
        if named != answers[-1].result.image.id:
            named = answers[-1].result.image.id
            config = rig.engine.call("GET", f"/images/{named}/json")["Config"]
            assert not [key for key in config["Labels"] or () if key.startswith("gpudock.")]

    return KillScenario("COMMIT", act, check)


SCENARIOS: dict[str, ScenarioFactory] = {
    "create": create,
    "scale-exchange": partial(scale, carry="exchange"),
    "scale-copy": partial(scale, carry="copy"),
    "scale-commit": partial(scale, carry="commit"),
    "rollback": rollback,
    "clone-copy": partial(clone, carry="copy"),
    "clone-commit": partial(clone, carry="commit"),
    "clone-of-a-revision-copy": partial(clone_of_revision, carry="copy"),
    "clone-of-a-revision-commit": partial(clone_of_revision, carry="commit"),
    "update-env": partial(update, field="env"),
    "update-labels": partial(update, field="labels"),
    "update-image": partial(update, field="image"),
    "stop": stop,
    "stop-paused": stop_paused,
    "start": partial(start, gpus="same"),
    "start-with-other-gpus": partial(start, gpus="other"),
    "restart": restart,
    "pause": partial(_pause_or_unpause, kind="PAUSE"),
    "unpause": partial(_pause_or_unpause, kind="UNPAUSE"),
    "delete": delete,
    "delete-revision": partial(delete_revision, carry="copy"),
    "delete-revision-image": partial(delete_revision, carry="commit"),
    "commit": commit,
}
