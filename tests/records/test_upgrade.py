"""A daemon of this version on the records of an earlier one: what it answers, and how it ends what was cut off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2

from tests.calls import IMAGE, Caller
from tests.conftest import FAST
from tests.engine.loops import detach_below
from tests.records.answers import answers_of
from tests.records.fixture import Recording, Stored, dump, load, recordings
from tests.records.record import HOST, KEPT, NODE
from tests.rig import Daemon, Rig


@pytest.fixture(params=recordings(), ids=lambda folder: folder.name)
def recording(request: pytest.FixtureRequest) -> Recording:
    """Each one there is."""
    return Recording.read(request.param)


@pytest.fixture
def prefix() -> str:
    """That of an installation of the test's own."""
    return f"/test-{uuid.uuid4().hex}/"


async def test_it_answers_what_its_predecessor_answered(clean_engine: Rig, recording: Recording, prefix: str) -> None:
    load(clean_engine.etcd, prefix, recording.keys)
    # Of another node, so that it drives nothing and the records stay as they are.
    flags = ("--node-name", "reader", "--host-id", HOST, "--etcd-prefix", prefix)
    async with _running(clean_engine, *flags) as (_, caller):
        answers = json.loads(json.dumps(await answers_of(caller)))
    assert recording.answers.keys() == answers.keys()
    for call, answer in recording.answers.items():
        assert answers[call] == answer, call
    assert {key for key, stored in dump(clean_engine.etcd, prefix).items() if stored != recording.keys.get(key)} <= {
        "nodes/reader"
    }


async def test_it_ends_what_its_predecessor_had_begun(clean_engine: Rig, recording: Recording, prefix: str) -> None:
    rig = clean_engine
    state_dir = rig.folder / f"records-{uuid.uuid4().hex[:8]}"
    keys = recording.texts_replaced(_engine_containers_again(rig, recording) | _folders(rig, recording, state_dir))
    load(rig.etcd, prefix, keys)
    flags = ("--node-name", NODE, "--host-id", HOST, "--etcd-prefix", prefix)
    async with _running(rig, *flags, state_dir=state_dir) as (daemon, caller):
        await caller.settled()
        listed = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest(page_size=1000))
        for one in listed.operations:
            print(one.id, one.kind, one.target.name, one.state, one.error.reason, one.error.message, one.message)
        for key in keys:
            if key.startswith("containers/"):
                with contextlib.suppress(Exception):
                    c = await caller.get(key.split("/")[1])
                    print(c.name, c.status.state, c.revision, c.status.message, c.spec.gpus.count, c.status.gpu_uuids)
        print(await caller.shell("half-scaled", "cat /file"))
        print(sorted(keys.keys() - dump(rig.etcd, prefix).keys()))
        print(daemon.log_text)
    assert 0


def _engine_containers_again(rig: Rig, recording: Recording) -> dict[str, str]:
    """Make the engine containers of the scale and of the create again; what is called otherwise now."""
    images = {tag: image["Id"] for image in rig.engine.call("GET", "/images/json") for tag in image["RepoTags"] or ()}
    replacements = {shown["Image"]: images[IMAGE] for shown in recording.engine.values()}
    for name, shown in recording.engine.items():
        body = shown["Config"] | {"Image": images[IMAGE], "HostConfig": shown["HostConfig"]}
        made = rig.engine.call("POST", "/containers/create", query={"name": name}, send=body)["Id"]
        replacements |= {shown["Id"]: made}
        layer = rig.engine.call("GET", f"/containers/{made}/json")["GraphDriver"]["Data"]["UpperDir"]
        replacements |= {shown["GraphDriver"]["Data"]["UpperDir"]: layer}
    return replacements


def _folders(rig: Rig, recording: Recording, state_dir: Path) -> dict[str, str]:
    return {}


@asynccontextmanager
async def _running(rig: Rig, *flags: str, state_dir: Path | None = None) -> AsyncIterator[tuple[Daemon, Caller]]:
    daemon = await rig.start_daemon(*FAST, *flags, state_dir=state_dir)
    try:
        async with Caller(daemon.target) as caller:
            yield daemon, caller
        assert daemon.running
        assert "Traceback" not in daemon.log_text, daemon.log_text
    finally:
        await asyncio.to_thread(daemon.stop)
        detach_below(rig.folder)
