"""ports.Engine: containers, events and exec. Calls whose effect exists already succeed."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from gpudock_server.errors import EngineRejected, ImageNotFound, PortInUse
from gpudock_server.model.container import PortBinding
from gpudock_server.model.engine import (
    LABEL_OPERATION,
    LABEL_UID,
    EngineEventKind,
    EngineState,
    ExecRequest,
    ExecStream,
)
from gpudock_server.model.spec import RestartPolicy, RestartPolicyKind
from gpudock_server.ports import Engine

from tests.calls import IDLE
from tests.contracts.engine_subject import EngineSubject
from tests.engine.engine_examples import engine_spec, inspect_container
from tests.rig.patience import limit

pytest_plugins = ["tests.contracts.engine_fixtures"]

MIB = 1 << 20

_NO_EVENTS = "it has no events"
_NO_PROCESSES = "FakeSession does what the test tells it, not what a command would do"
NOT_FAKED = {
    "fake": {
        "test_a_removal_deletes_the_own_volumes_only_on_request": (
            "FakeEngine keeps no mounts and makes no anonymous volumes"
        ),
        "test_a_file_holder_never_runs": "FakeEngine makes no container for it",
        "test_exited_within_returns_the_exit_code_or_none": "processes of FakeEngine never end by themselves",
        "test_a_start_with_a_port_of_another_container_is_refused": "FakeEngine publishes no ports",
        "test_limits_and_policy_change_in_place": "FakeEngine keeps no limits",
        "test_events_are_sent_from_a_given_time": _NO_EVENTS,
        "test_an_exec_has_output_and_an_exit_code": _NO_PROCESSES,
    },
    "model": {
        "test_a_start_with_a_port_of_another_container_is_refused": "ModelEngine asserts that no saga ever asks for it",
        "test_events_are_sent_from_a_given_time": _NO_EVENTS,
        "test_an_exec_has_output_and_an_exit_code": _NO_PROCESSES,
    },
}


@pytest.fixture
def subject(any_engine: EngineSubject) -> EngineSubject:
    return any_engine


@pytest.fixture
def engine(subject: EngineSubject) -> Engine:
    return subject.engine


async def test_info(engine: Engine) -> None:
    info = await engine.info()
    assert info.id
    assert info.version
    assert info.storage_driver
    assert info.root_dir.startswith("/")
    assert info.cpus > 0
    assert info.memory_bytes > 0
    assert tuple(int(part) for part in info.api_version.split(".")) >= (1, 40)


# ---- create, find, inspect ----


async def test_create_is_idempotent_within_an_operation(engine: Engine, subject: EngineSubject) -> None:
    spec = await engine_spec(engine, image=subject.image)
    first = await engine.create(spec)
    assert await engine.create(spec) == first
    for labels in (spec.labels | {LABEL_OPERATION: "op2"}, {}):
        with pytest.raises(EngineRejected) as refused:
            await engine.create(dataclasses.replace(spec, labels=labels))
        assert refused.value.status == 409
    assert [container.id for container in await engine.find({LABEL_UID: ""})] == [first]


async def test_create_without_its_image_is_refused(engine: Engine, subject: EngineSubject) -> None:
    spec = await engine_spec(engine, image=subject.image)
    with pytest.raises(ImageNotFound):
        await engine.create(dataclasses.replace(spec, image_id="sha256:" + "0" * 64))
    assert await engine.find({LABEL_UID: ""}) == ()


async def test_a_container_is_shown_by_id_and_by_name(engine: Engine, subject: EngineSubject) -> None:
    image = await engine.image(subject.image)
    assert image is not None
    box = await subject.create()
    container = await inspect_container(engine, box)
    assert await inspect_container(engine, "box") == container
    assert (container.id, container.name, container.image_id) == (box, "box", image.id)
    assert (container.state, container.pid, container.alive) == (EngineState.CREATED, 0, False)
    assert container.labels[LABEL_UID] == "uid-box"
    assert await engine.inspect("nonesuch") is None


async def test_containers_are_found_by_all_of_their_labels(engine: Engine, subject: EngineSubject) -> None:
    first, second = [await subject.create(name) for name in ("one", "two")]
    await engine.start(first)
    for labels, ids in (
        ({LABEL_UID: ""}, {first, second}),
        ({LABEL_UID: "uid-two"}, {second}),
        ({LABEL_OPERATION: "op1", "gpudock.name": "one"}, {first}),
        ({LABEL_OPERATION: "op2"}, set()),
        ({"missing": ""}, set()),
    ):
        assert {container.id for container in await engine.find(labels)} == ids


async def test_a_file_holder_never_runs(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.running(cpus=1, memory_bytes=64 * MIB)
    made = await engine.create_file_holder(box, "holder", {LABEL_OPERATION: "op1", "team": "x"})
    assert await engine.create_file_holder(box, "holder", {LABEL_OPERATION: "op1", "team": "x"}) == made
    holder, source = await inspect_container(engine, made), await inspect_container(engine, box)
    assert (holder.name, holder.state, holder.image_id) == ("holder", EngineState.CREATED, source.image_id)
    assert {key: holder.labels.get(key) for key in (LABEL_OPERATION, "team")} == {LABEL_OPERATION: "op1", "team": "x"}
    assert (holder.gpu_uuids, holder.ports, holder.cpus, holder.volumes) == ((), (), 0, {})
    with pytest.raises(EngineRejected):
        await engine.create_file_holder(box, "holder", {LABEL_OPERATION: "op2"})
    with pytest.raises(EngineRejected):
        await engine.create_file_holder("nonesuch", "other", {LABEL_OPERATION: "op1"})


# ---- start, stop, pause, wait, remove ----


async def test_starting_a_running_container_succeeds(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.running()
    before = await inspect_container(engine, box)
    assert before.state is EngineState.RUNNING
    await engine.start(box)
    assert (await inspect_container(engine, box)).start_time == before.start_time


async def test_starting_a_missing_or_paused_container_is_refused(engine: Engine, subject: EngineSubject) -> None:
    with pytest.raises(EngineRejected):
        await engine.start("nonesuch")
    box = await subject.running()
    await engine.pause(box)
    with pytest.raises(EngineRejected, match="paused"):
        await engine.start(box)
    assert await subject.state(box) is EngineState.PAUSED


async def test_a_start_with_a_port_of_another_container_is_refused(engine: Engine, subject: EngineSubject) -> None:
    ports = (PortBinding(container_port=80, host_port=18_123),)
    await subject.running("first", ports=ports)
    box = await subject.create("second", ports=ports)
    with pytest.raises(PortInUse):
        await engine.start(box)
    assert not (await inspect_container(engine, box)).alive


async def test_a_stopped_container_can_be_started_again(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.running(command=IDLE)
    for _ in range(2):
        await engine.stop(box, 10)
        assert await subject.state(box) is EngineState.EXITED
    await engine.stop("nonesuch", 10)
    await engine.start(box)
    assert await subject.state(box) is EngineState.RUNNING, "the container was not started again"
    for _ in range(2):
        await engine.stop(box, 0)
        assert await subject.state(box) is EngineState.EXITED
    await engine.stop("nonesuch", 0)


async def test_stopping_a_container_that_never_ran_changes_nothing(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.create()
    await engine.stop(box, 10)
    await engine.stop(box, 0)
    assert await subject.state(box) is EngineState.CREATED


@pytest.mark.parametrize("seconds", [0, 1])
async def test_a_paused_container_can_be_stopped(engine: Engine, subject: EngineSubject, seconds: float) -> None:
    box = await subject.running()
    await engine.pause(box)
    await engine.stop(box, seconds)
    assert not (await inspect_container(engine, box)).running


async def test_containers_are_paused_and_unpaused(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.running()
    for _ in range(2):
        await engine.pause(box)
        assert await subject.state(box) is EngineState.PAUSED
    for _ in range(2):
        await engine.unpause(box)
        assert await subject.state(box) is EngineState.RUNNING
    await engine.stop(box, 0)
    for change in (engine.pause, engine.unpause):
        for engine_id in (box, "nonesuch"):
            with pytest.raises(EngineRejected):
                await change(engine_id)


async def test_exited_within_returns_the_exit_code_or_none(engine: Engine, subject: EngineSubject) -> None:
    living = await subject.running("living")
    assert await engine.exited_within(living, 0.1) is None
    box = await subject.running_to_exit(7)
    for _ in range(2):
        assert await engine.exited_within(box, 60) == 7
    assert (await inspect_container(engine, box)).exit_code == 7
    assert await engine.exited_within(await subject.create("never-ran"), 60) == 0


async def test_waiting_for_a_missing_container_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineRejected):
        await engine.exited_within("nonesuch", 1)


async def test_limits_and_policy_change_in_place(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.running()
    await engine.update(box, cpus=0, memory_bytes=0)
    assert (await inspect_container(engine, box)).cpus == 0
    policy = RestartPolicy(kind=RestartPolicyKind.ON_FAILURE, max_retry_count=3)
    await engine.update(box, cpus=1, memory_bytes=64 * MIB, restart_policy=policy)
    for _ in range(2):
        container = await inspect_container(engine, box)
        assert (container.cpus, container.memory_bytes, container.restart_policy) == (1, 64 * MIB, policy)
        await engine.update(box, cpus=1, memory_bytes=64 * MIB)
    await engine.stop(box, 0)
    await engine.update(box, cpus=2, memory_bytes=64 * MIB)
    assert (await inspect_container(engine, box)).cpus == 2, "the limits of a stopped container did not change"


async def test_an_update_of_a_missing_container_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineRejected):
        await engine.update("nonesuch", cpus=1, memory_bytes=0)


async def test_a_container_is_renamed_to_a_free_name(engine: Engine, subject: EngineSubject) -> None:
    box, other = await subject.create("box"), await subject.create("other")
    for _ in range(2):
        await engine.rename(box, "better")
        assert (await inspect_container(engine, "better")).id == box
        assert await engine.inspect("box") is None
    with pytest.raises(EngineRejected):
        await engine.rename(box, "other")
    assert (await inspect_container(engine, box)).name == "better"
    assert (await inspect_container(engine, "other")).id == other
    with pytest.raises(EngineRejected):
        await engine.rename("nonesuch", "new")


async def test_a_removed_container_releases_its_name(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.running()
    await asyncio.gather(*(engine.remove(box) for _ in range(4)))
    assert await engine.inspect(box) is None
    await engine.remove(box)
    await engine.remove("nonesuch")
    assert await subject.create() != box, "the name was not released"


async def test_a_removal_deletes_the_own_volumes_only_on_request(engine: Engine, subject: EngineSubject) -> None:
    target = subject.volume_target
    first = await subject.create("first", image=subject.volume_image)
    made = (await inspect_container(engine, first)).volumes[target]
    shown = await engine.inspect_volume(made)
    assert shown is not None
    assert shown.anonymous
    successor = await subject.create("successor", image=subject.volume_image, volumes={target: made})
    assert (await inspect_container(engine, successor)).volumes == {target: made}
    await engine.remove(successor, own_volumes=True)
    assert await engine.inspect_volume(made), "a volume that was mounted by name was removed"
    await engine.remove(first)
    assert await engine.inspect_volume(made), "volumes stay"
    third = await subject.create("third", image=subject.volume_image)
    own = (await inspect_container(engine, third)).volumes[target]
    for _ in range(2):
        await engine.remove(third, own_volumes=True)
        assert not await engine.inspect_volume(own)
    await engine.remove_volume(made)


# ---- events, exec ----


async def test_events_are_sent_from_a_given_time(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.running()
    start = (await inspect_container(engine, box)).create_time
    assert start is not None
    async with asyncio.timeout(limit(60)):
        stream = engine.events(int(start.timestamp()) * 10**9)
        event = await anext(stream)
        while event.engine_id != box:
            event = await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]  # an async generator; the protocol declares an iterator
    assert event.kind is EngineEventKind.START
    assert event.labels[LABEL_UID] == "uid-box"


async def test_an_exec_has_output_and_an_exit_code(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.running()
    request = ExecRequest(command=("sh", "-c", "cat; echo error >&2; exit 3"), stdin=True)
    session = await engine.exec(box, request)
    assert (await session.status()).running
    await session.write(b"said")
    await session.close_stdin()
    said = {ExecStream.STDOUT: b"", ExecStream.STDERR: b""}
    async with asyncio.timeout(subject.patience):
        async for stream, data in session.read():
            said[stream] += data
    assert said == {ExecStream.STDOUT: b"said", ExecStream.STDERR: b"error\n"}
    status = await session.status()
    assert (status.running, status.exit_code) == (False, 3)
    await session.close()


async def test_an_exec_in_a_stopped_container_is_refused(engine: Engine, subject: EngineSubject) -> None:
    box = await subject.create()
    for engine_id in (box, "nonesuch"):
        with pytest.raises(EngineRejected):
            await engine.exec(engine_id, ExecRequest(command=("true",)))
