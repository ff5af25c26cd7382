"""A daemon of this version with the records of an earlier one: its answers, and the end of interrupted operations."""

from __future__ import annotations

import asyncio
import json
import subprocess
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gpudock.v1 import container_pb2, drift_pb2, node_service_pb2, operation_pb2, operation_service_pb2, volume_pb2

from tests.calls import IMAGE, Caller
from tests.conftest import FAST_FLAGS
from tests.engine.isolated_daemons import until_state
from tests.engine.loop_devices import detach_loop_devices
from tests.records.answers import answers_of, message_json
from tests.records.recorder import HALF_CREATED, HALF_RESIZED, HALF_SCALED, HOST, KEPT, NODE, SIZE, USER
from tests.records.recording import Recording, Stored, dump, load, recordings, replace_texts, require_contains
from tests.rig import Daemon, Rig

_RUNNING, _FAILED = container_pb2.CONTAINER_STATE_RUNNING, container_pb2.CONTAINER_STATE_FAILED
_XFS_LOG_BYTES = 64 << 20
# The engine has lost all other engine containers and volumes. The operations on these can succeed nevertheless.
_DONE_WITHOUT_AN_ENGINE = {"half-stopped", "half-deleted", "half-made", "carried"}
_GONE_CONTAINERS = {"half-deleted", "half-cloned", "half-undone"}
_GONE_VOLUMES = {"half-deleted", "half-adopted"}


@pytest.fixture(params=recordings(), ids=lambda folder: folder.name)
def recording(request: pytest.FixtureRequest) -> Recording:
    """Each recording."""
    return Recording.read(request.param)


@pytest.fixture
def prefix() -> str:
    """The etcd prefix of an installation that only the test uses."""
    return f"/test-{uuid.uuid4().hex}/"


async def test_the_daemon_answers_as_its_predecessor(clean_engine: Rig, recording: Recording, prefix: str) -> None:
    load(clean_engine.etcd, prefix, recording.keys)
    # The daemon of another node drives no operation, so that the records are unchanged; only the schema may rise.
    flags = ("--node-name", "reader", "--host-id", HOST, "--etcd-prefix", prefix)
    async with _running(clean_engine, *flags) as (_, caller):
        answers = json.loads(json.dumps(await answers_of(caller)))
        now = dump(clean_engine.etcd, prefix)
    assert answers.keys() == recording.answers.keys()
    for call, answer in recording.answers.items():
        require_contains(answers[call], answer, call)
    assert {key for key in now if now[key] != recording.keys.get(key)} - {"schema"} == {"nodes/reader"}
    assert recording.keys.keys() <= now.keys()


async def test_the_daemon_ends_the_operations_of_its_predecessor(
    clean_engine: Rig, recording: Recording, prefix: str
) -> None:
    rig = clean_engine
    state_dir = rig.folder / f"records-{uuid.uuid4().hex[:8]}"
    keys = _make_engine_state(rig, recording, state_dir)
    load(rig.etcd, prefix, keys)
    flags = ("--node-name", NODE, "--host-id", HOST, "--etcd-prefix", prefix)
    async with _running(rig, *flags, state_dir=state_dir) as (_, caller):
        await caller.until_idle()
        await _require_scaled(caller, recording)
        await _require_created(caller)
        await _require_resized(caller)
        await _require_operations_ended(caller, keys)
        await _require_objects(caller, keys, recording)
        drift = await caller.nodes.ListDrift(node_service_pb2.ListDriftRequest(page_size=1000))
        assert drift_pb2.DRIFT_KIND_RECORD_UNREADABLE not in {entry.kind for entry in drift.drift}
        left = dump(rig.etcd, prefix)
    assert not [key for key in left if key.startswith(("locks/", "arguments/"))]
    # These may be gone: what the operations delete or had made, and claims of containers that the engine has lost.
    gone = [*(f"containers/{name}" for name in _GONE_CONTAINERS), *(f"volumes/{name}" for name in _GONE_VOLUMES)]
    of_gone = {_uid(keys, key) for key in gone}
    revision = f"containers/{_uid(keys, 'containers/carried')}/0000000001"
    for key in keys.keys() - left.keys():
        ended = key.startswith(("locks/", "arguments/", "hosts/", "images/"))
        assert ended or key in gone or of_gone & set(key.split("/")) or key.endswith(revision), key


async def _require_scaled(caller: Caller, recording: Recording) -> None:
    """The scale was resumed, and the new engine container has the files."""
    container = await caller.get(HALF_SCALED)
    assert (container.status.state, container.revision) == (_RUNNING, 2)
    assert (container.spec.gpus.count, len(container.status.gpu_uuids)) == (1, 1)
    assert await caller.shell(HALF_SCALED, "cat /file") == f"{KEPT}\n"
    assert (await caller.holders())[container.status.gpu_uuids[0]] == HALF_SCALED
    assert [revision.revision for revision in await caller.revisions(HALF_SCALED)] == [1, 2]
    assert len(recording.answers[f"ListContainerRevisions {HALF_SCALED}"]) == 1


async def _require_created(caller: Caller) -> None:
    container = await caller.get(HALF_CREATED)
    assert (container.status.state, container.revision) == (_RUNNING, 1)
    assert (await caller.run(HALF_CREATED, "true")).code == 0


async def _require_resized(caller: Caller) -> None:
    """The smaller volume has the files, and the container that mounts it was started again."""
    volume = await caller.volume(HALF_RESIZED)
    assert (volume.state, volume.size_bytes, volume.revision) == (volume_pb2.VOLUME_STATE_READY, SIZE, 2)
    assert await caller.shell(USER, "cat /data/file") == f"{KEPT}\n"


async def _require_operations_ended(caller: Caller, keys: Mapping[str, Stored]) -> None:
    listed = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest(page_size=1000))
    operations = {operation.id: operation for operation in listed.operations}
    for key in keys:
        if not key.startswith("operations/"):
            continue
        record = json.loads(keys[key].value)["record"]
        operation = operations[record["id"]]
        if record["end_time"]:
            continue
        name = operation.target.name
        done = name in _DONE_WITHOUT_AN_ENGINE | {HALF_SCALED, HALF_CREATED, HALF_RESIZED}
        state = operation_pb2.OPERATION_STATE_SUCCEEDED if done else operation_pb2.OPERATION_STATE_FAILED
        assert operation.state == state, operation
        assert bool(operation.error.reason) != done, operation


async def _require_objects(caller: Caller, keys: Mapping[str, Stored], recording: Recording) -> None:
    """Every container and volume exists with its spec; containers that the engine has lost are FAILED."""
    running = {HALF_SCALED, HALF_CREATED, USER}
    for sort, _, name in (key.partition("/") for key in keys):
        if sort == "containers" and name not in _GONE_CONTAINERS:
            # The state changes only once the operation on the container has ended.
            await until_state(caller, name, _RUNNING if name in running else _FAILED, seconds=60)
            container = await caller.get(name)
            assert container.uid == _uid(keys, f"{sort}/{name}")
            spec = dict(recording.answers[f"GetContainer {name}"]["spec"])
            if name == HALF_SCALED:
                spec.pop("gpus", None)
            require_contains(message_json(container.spec), spec, name)
        if sort == "volumes" and name not in _GONE_VOLUMES:
            assert (await caller.volume(name)).uid == _uid(keys, f"{sort}/{name}")


def _uid(keys: Mapping[str, Stored], key: str) -> str:
    uid: str = json.loads(keys[key].value)["record"]["uid"]
    return uid


# -- the engine containers, volumes and files of the predecessor -----------------------------------------------------


def _make_engine_state(rig: Rig, recording: Recording, state_dir: Path) -> dict[str, Stored]:
    """Make the engine containers and volumes of the scale, the create and the resize.

    Returns the records with the ids and paths of this engine.
    """
    engine = rig.engine
    images = engine.image_ids()
    names = {recording.engine["state_dir"]: str(state_dir)}
    for volume, had in recording.engine["volumes"].items():
        send = {"Name": volume, "Driver": had["Driver"], "Labels": _replaced(had["Labels"], names)}
        engine.call("POST", "/volumes/create", send=send | {"DriverOpts": _replaced(had["Options"], names)})
    names |= {had["Image"]: images[IMAGE] for had in recording.engine["containers"].values()}
    for name, had in recording.engine["containers"].items():
        body = _replaced(had["Config"] | {"HostConfig": had["HostConfig"]}, names)
        made = engine.call("POST", "/containers/create", query={"name": name}, send=body)["Id"]
        layer = engine.call("GET", f"/containers/{made}/json")["GraphDriver"]["Data"]["UpperDir"]
        names |= {had["Id"]: made, had["GraphDriver"]["Data"]["UpperDir"]: layer}
    names[recording.engine["data_root"]] = str(engine.data_root)
    _make_backings(recording, state_dir, names)
    return _with_inodes(
        {
            replace_texts(key, names): Stored(replace_texts(stored.value.decode(), names).encode(), stored.leased)
            for key, stored in recording.keys.items()
        }
    )


def _with_inodes(keys: Mapping[str, Stored]) -> dict[str, Stored]:
    """Replace the inodes of layers in the scale's record, and write a file to the old layer."""
    changed = dict(keys)
    for key, stored in keys.items():
        record = json.loads(stored.value)["record"] if key.startswith("operations/") else {}
        if record.get("kind") == "SCALE" and not record["end_time"]:
            facts = next(stage["facts"] for stage in record["stages"] if stage["name"] == "locate")
            Path(facts["old_path"], "file").write_text(f"{KEPT}\n")
            text = stored.value.decode()
            for which in ("old", "new"):
                inode = Path(facts[f"{which}_path"]).stat().st_ino
                text = text.replace(f'"{which}_inode":{facts[f"{which}_inode"]}', f'"{which}_inode":{inode}')
            changed[key] = Stored(text.encode(), stored.leased)
    return changed


def _make_backings(recording: Recording, state_dir: Path, names: Mapping[str, str]) -> None:
    """Make the two backings of the resize: the source with a file, and the empty copy."""
    content = state_dir.parent / f"{state_dir.name}-file"
    content.write_text(f"{KEPT}\n")
    prototype = state_dir.parent / f"{state_dir.name}-prototype"
    for path, text in recording.disk.items():
        backing = json.loads(text).get("backing", {})
        if backing.get("name") != HALF_RESIZED:
            continue
        file = state_dir / path
        file.parent.mkdir(parents=True, mode=0o700)
        file.write_text(replace_texts(text, names))
        whole = json.loads(text).get("volume") is not None
        prototype.write_text(f"/\n0 0\nd--755 0 0\n{f'file ---644 0 0 {content}' if whole else ''}\n$\n")
        image = file.parent / "image"
        with image.open("wb") as sparse:
            sparse.truncate(backing["size_bytes"] + _XFS_LOG_BYTES)
        words = ["mkfs.xfs", "-q", "-K", "-l", f"size={_XFS_LOG_BYTES}", "-p", str(prototype), str(image)]
        subprocess.run(words, check=True)


def _replaced(content: Any, names: Mapping[str, str]) -> Any:
    """JSON with texts replaced in all keys and values."""
    return json.loads(replace_texts(json.dumps(content), names))


@asynccontextmanager
async def _running(rig: Rig, *flags: str, state_dir: Path | None = None) -> AsyncIterator[tuple[Daemon, Caller]]:
    daemon = await rig.start_daemon(*FAST_FLAGS, *flags, state_dir=state_dir)
    try:
        async with Caller(daemon.target) as caller:
            yield daemon, caller
        assert daemon.running
        assert "Traceback" not in daemon.log_text, daemon.log_text
    finally:
        await asyncio.to_thread(daemon.stop)
        if state_dir is not None:
            await asyncio.to_thread(rig.engine.remove_all)
            detach_loop_devices(state_dir)
