"""ports.Engine: images, volumes and the life of a container, and that "already done" is success everywhere."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.errors import EngineRejected, ImageNotFound, ImagePullFailed, PortInUse, VolumeExists
from gpudock_server.model.container import PortBinding
from gpudock_server.model.engine import (
    LABEL_OPERATION,
    LABEL_UID,
    EngineEventKind,
    EngineState,
    ExecRequest,
    ExecStream,
)
from gpudock_server.model.spec import Mount, RestartPolicy, RestartPolicyKind
from gpudock_server.ports import Engine

from tests.engine.engine_examples import CUDA_LIKE, IDLE, IMAGE, engine_spec, seen
from tests.rig import Rig
from tests.rpc import fakes
from tests.unit import model_engine
from tests.unit.faults import Faults
from tests.unit.model_engine import ModelEngine

MIB = 1 << 20
OTHERS_UID = "uid-other"


@dataclass
class Subject:
    """An implementation, and two images that it has: the second one has a VOLUME line for `volume_target`."""

    engine: Engine
    image: str
    volume_image: str
    volume_target: str
    # Seconds to wait for what a process does: of what is in memory, which never comes, not long.
    patience: float = 0.1

    async def create(self, name: str = "box", **options: object) -> str:
        """A container of the first image unless another is given."""
        return await self.engine.create(await engine_spec(self.engine, name, **{"image": self.image, **options}))  # type: ignore[arg-type]  # as engine_spec takes them

    async def running(self, name: str = "box", **options: object) -> str:
        """The same, started."""
        engine_id = await self.create(name, **options)
        await self.engine.start(engine_id)
        return engine_id

    async def running_to_exit(self, code: int) -> str:
        """A container whose process ends with this code when it is started."""
        if isinstance(self.engine, ModelEngine):
            self.engine.ends = code
        return await self.running(command=("sh", "-c", f"exit {code}"))

    async def write(self, engine_id: str) -> None:
        """A file in a container's writable layer, where it has one."""
        if isinstance(self.engine, ModelEngine):
            self.engine.write(engine_id, "written")
        elif upper := (await seen(self.engine, engine_id)).upper_dir:
            Path(upper, "written").touch()  # noqa: ASYNC240 - nothing else waits

    async def state(self, engine_id: str) -> EngineState:
        """What the engine says of it."""
        return (await seen(self.engine, engine_id)).state


@pytest.fixture
async def docker_subject(clean_engine: Rig) -> AsyncIterator[Subject]:
    """On the rig's engine."""
    engine = await DockerEngine.connect(clean_engine.engine.url, timeout=60)
    try:
        yield Subject(engine, IMAGE, CUDA_LIKE, "/data", patience=60)
    finally:
        await engine.close()


@pytest.fixture
def model_subject() -> Subject:
    """The fake of saga tests, which holds files."""
    return Subject(ModelEngine(Faults()), model_engine.OTHER_IMAGE, model_engine.IMAGE, "/cache")


@pytest.fixture
def fake_subject() -> Subject:
    """The fake of RPC tests, which holds states."""
    return Subject(fakes.FakeEngine(), fakes.IMAGE, fakes.IMAGE, "/data")


@pytest.fixture(params=["fake", "model", "docker"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each implementation in turn."""
    made: Subject = request.getfixturevalue(f"{request.param}_subject")
    return made


@pytest.fixture
def engine(subject: Subject) -> Engine:
    return subject.engine


_NO_IMAGES = "FakeEngine has one image, and makes up ids for those that are made"
_NO_MOUNTS = "FakeEngine keeps no mounts and makes no anonymous volumes"
_NO_EVENTS = "it has no events"
_NO_PROCESSES = "FakeSession does what the test tells it, not what a command would do"
NOT_FAKED = {
    "fake": {
        "test_committing_adds_one_layer_and_the_name": _NO_IMAGES,
        "test_committing_what_has_written_nothing_adds_no_layer": _NO_IMAGES,
        "test_a_name_moves_from_one_image_to_another": _NO_IMAGES,
        "test_an_image_that_is_used_stays": _NO_IMAGES,
        "test_images_made_of_others": _NO_IMAGES,
        "test_a_pull_that_fails": "FakeEngine pulls every image",
        "test_who_mounts_an_engine_volume": _NO_MOUNTS,
        "test_a_removed_container_leaves_its_volumes_unless_told_to_take_its_own": _NO_MOUNTS,
        "test_a_container_that_holds_files_and_never_runs": "FakeEngine makes no container for it",
        "test_exited_within": "processes of FakeEngine never end by themselves",
        "test_a_port_of_another_container": "FakeEngine publishes no ports",
        "test_limits_and_policy_change_in_place": "FakeEngine keeps no limits",
        "test_events_are_told_from_a_time_on": _NO_EVENTS,
        "test_exec": _NO_PROCESSES,
    },
    "model": {
        "test_a_port_of_another_container": "ModelEngine asserts that no saga ever asks for it",
        "test_events_are_told_from_a_time_on": _NO_EVENTS,
        "test_exec": _NO_PROCESSES,
    },
}


async def test_info(engine: Engine) -> None:
    info = await engine.info()
    assert info.id
    assert info.version
    assert info.storage_driver
    assert info.root_dir.startswith("/")
    assert info.cpus > 0
    assert info.memory_bytes > 0
    assert tuple(int(part) for part in info.api_version.split(".")) >= (1, 40)


# ---- images ----


async def test_an_image_is_found_by_name_and_by_id(engine: Engine, subject: Subject) -> None:
    image = await engine.image(subject.image)
    assert image is not None
    assert await engine.image(image.id) == image
    assert subject.image in await engine.image_names()
    assert image.id in await engine.image_ids()
    assert await engine.image("nonesuch") is None
    assert await engine.image("sha256:" + "0" * 64) is None


async def test_a_pull_that_fails(engine: Engine) -> None:
    with pytest.raises(ImagePullFailed) as failed:
        await engine.pull("127.0.0.1:1/nonesuch", None, lambda _current, _total: None)
    assert failed.value.image == "127.0.0.1:1/nonesuch"


async def test_committing_adds_one_layer_and_the_name(engine: Engine, subject: Subject) -> None:
    base = await engine.image(subject.image)
    assert base is not None
    box = await subject.running()
    await engine.stop(box, 0)
    await subject.write(box)
    made = await engine.commit(box, "gpudock/contract:1", {LABEL_OPERATION: "op1"})
    try:
        image = await engine.image("gpudock/contract:1")
        assert image is not None
        assert image.id == made
        assert (len(image.layers), image.layers[:-1]) == (len(base.layers) + 1, base.layers)
        assert "gpudock/contract:1" in await engine.image_names()
        for call in (
            engine.commit("nonesuch", "gpudock/contract:2", {}),
            engine.commit(box, "gpudock/contract:2", {}, config_of="nonesuch"),
        ):
            with pytest.raises(EngineRejected):
                await call
        assert await engine.image("gpudock/contract:2") is None
    finally:
        await engine.remove_image("gpudock/contract:1")
    assert await engine.image(made) is None


async def test_committing_what_has_written_nothing_adds_no_layer(engine: Engine, subject: Subject) -> None:
    base = await engine.image(subject.image)
    assert base is not None
    made = await engine.commit(await subject.create(), "gpudock/contract:same", {})
    image = await engine.image(made)
    await engine.remove_image("gpudock/contract:same")
    assert image is not None
    assert image.layers == base.layers
    assert image.id != base.id


async def test_a_name_moves_from_one_image_to_another(engine: Engine, subject: Subject) -> None:
    one, other = await engine.image(subject.image), await engine.image(subject.volume_image)
    assert one is not None
    assert other is not None
    try:
        for image in (one, one, other):
            await engine.tag(image.id, "gpudock/contract:moves")
            assert await engine.image("gpudock/contract:moves") == image
    finally:
        for _ in range(2):
            await engine.remove_image("gpudock/contract:moves")
    assert await engine.image("gpudock/contract:moves") is None
    assert await engine.image(subject.volume_image) == other, "only the name is gone"
    with pytest.raises(EngineRejected):
        await engine.tag("nonesuch", "gpudock/contract:moves")


async def test_an_image_that_is_used_stays(engine: Engine, subject: Subject) -> None:
    source = await subject.create()
    made = await engine.commit(source, "gpudock/contract:used", {})
    box = await subject.create("user", image="gpudock/contract:used")
    await engine.remove_image("gpudock/contract:used")
    assert await engine.image(made) is not None
    await engine.remove(box)
    await engine.remove_image("gpudock/contract:used")
    await engine.remove_image(made)
    assert await engine.image(made) is None


async def test_images_made_of_others(engine: Engine, subject: Subject) -> None:
    base, other = await engine.image(subject.image), await engine.image(subject.volume_image)
    assert base is not None
    assert other is not None
    box = await subject.create()
    await subject.write(box)
    once = await engine.commit(box, "gpudock/contract:once", {})
    again = await subject.create("again", image="gpudock/contract:once")
    await subject.write(again)
    twice = await engine.commit(again, "gpudock/contract:twice", {})
    names = ["once", "twice", "clean", "config", "flat", "onto"]
    try:
        clean = await engine.strip_identity(once, base.id, "gpudock/contract:clean")
        config = await engine.replace_config(twice, other.id, "gpudock/contract:config")
        flat = await engine.flatten(twice, len(base.layers), "gpudock/contract:flat", config_of=once)
        onto = await engine.flatten(twice, len(base.layers), "gpudock/contract:onto", config_of=once, onto=other.id)
        shown = {name: await engine.image(f"gpudock/contract:{name}") for name in names}
        images = {name: image for name, image in shown.items() if image}
        assert [images[name].id for name in ("clean", "config", "flat", "onto")] == [clean, config, flat, onto]
        assert images["clean"].layers == images["once"].layers
        assert images["config"].layers == images["twice"].layers
        assert images["config"].volumes == other.volumes
        assert images["flat"].layers[:-1] == base.layers
        assert images["onto"].layers[:-1] == other.layers
    finally:
        for engine_id in (again, box):
            await engine.remove(engine_id)
        for name in reversed(names):
            await engine.remove_image(f"gpudock/contract:{name}")


# ---- engine volumes ----


async def test_an_engine_volume_is_made_once(engine: Engine) -> None:
    labels = {LABEL_UID: "uid-1", "team": "x"}
    made = await engine.create_volume("own", labels=labels, driver_options={})
    assert await engine.create_volume("own", labels=labels, driver_options={}) == made
    assert await engine.inspect_volume("own") == made
    assert await engine.has_volume("own")
    assert "own" in await engine.volume_names()
    assert (made.name, made.driver, made.labels) == ("own", "local", labels)
    for theirs, options in (({LABEL_UID: OTHERS_UID}, {}), (labels, {"type": "tmpfs", "device": "tmpfs"})):
        with pytest.raises(VolumeExists):
            await engine.create_volume("own", labels=theirs, driver_options=options)
    assert await engine.inspect_volume("own") == made, "what is there stays as it is"
    for _ in range(2):
        await engine.remove_volume("own")
    assert await engine.inspect_volume("own") is None
    assert not await engine.has_volume("own")
    assert "own" not in await engine.volume_names()


async def test_engine_volumes_are_found_by_all_of_their_labels(engine: Engine) -> None:
    for name, team in (("v1", "x"), ("v2", "y")):
        await engine.create_volume(name, labels={LABEL_UID: f"uid-{name}", "team": team}, driver_options={})
    for labels, names in (
        ({"team": "x"}, {"v1"}),
        ({"team": "y", LABEL_UID: "uid-v2"}, {"v2"}),
        ({"team": "x", LABEL_UID: "uid-v2"}, set()),
    ):
        assert {one.name for one in await engine.find_volumes(labels)} == names


async def test_who_mounts_an_engine_volume(engine: Engine, subject: Subject) -> None:
    await engine.create_volume("v1", labels={LABEL_UID: "uid-v1"}, driver_options={})
    assert await engine.mounting("v1") == ()
    box = await subject.create(mounts=(Mount(volume="v1", target="/v"),))
    assert (await seen(engine, box)).volumes["/v"] == "v1"
    assert [one.id for one in await engine.mounting("v1")] == [box]
    assert await engine.mounting("nonesuch") == ()
    with pytest.raises(EngineRejected, match="in use"):
        await engine.remove_volume("v1")
    await engine.remove(box)
    assert await engine.has_volume("v1"), "it is removed by its name alone"
    await engine.remove_volume("v1")


# ---- create, find, inspect ----


async def test_create_is_idempotent_within_an_operation(engine: Engine, subject: Subject) -> None:
    wanted = await engine_spec(engine, image=subject.image)
    first = await engine.create(wanted)
    assert await engine.create(wanted) == first
    for labels in (wanted.labels | {LABEL_OPERATION: "op2"}, {}):
        with pytest.raises(EngineRejected) as refused:
            await engine.create(dataclasses.replace(wanted, labels=labels))
        assert refused.value.status == 409
    assert [one.id for one in await engine.find({LABEL_UID: ""})] == [first]


async def test_create_of_an_image_that_is_gone(engine: Engine, subject: Subject) -> None:
    wanted = await engine_spec(engine, image=subject.image)
    with pytest.raises(ImageNotFound):
        await engine.create(dataclasses.replace(wanted, image_id="sha256:" + "0" * 64))
    assert await engine.find({LABEL_UID: ""}) == ()


async def test_a_container_is_shown_by_id_and_by_name(engine: Engine, subject: Subject) -> None:
    image = await engine.image(subject.image)
    assert image is not None
    box = await subject.create()
    container = await seen(engine, box)
    assert await seen(engine, "box") == container
    assert (container.id, container.name, container.image_id) == (box, "box", image.id)
    assert (container.state, container.pid, container.alive) == (EngineState.CREATED, 0, False)
    assert container.labels[LABEL_UID] == "uid-box"
    assert await engine.inspect("nonesuch") is None


async def test_find(engine: Engine, subject: Subject) -> None:
    one, two = [await subject.create(name) for name in ("one", "two")]
    await engine.start(one)
    for labels, ids in (
        ({LABEL_UID: ""}, {one, two}),
        ({LABEL_UID: "uid-two"}, {two}),
        ({LABEL_OPERATION: "op1", "gpudock.name": "one"}, {one}),
        ({LABEL_OPERATION: "op2"}, set()),
        ({"nobody has it": ""}, set()),
    ):
        assert {container.id for container in await engine.find(labels)} == ids


async def test_a_container_that_holds_files_and_never_runs(engine: Engine, subject: Subject) -> None:
    box = await subject.running(cpus=1, memory_bytes=64 * MIB)
    made = await engine.create_file_holder(box, "holder", {LABEL_OPERATION: "op1", "team": "x"})
    assert await engine.create_file_holder(box, "holder", {LABEL_OPERATION: "op1", "team": "x"}) == made
    holder, source = await seen(engine, made), await seen(engine, box)
    assert (holder.name, holder.state, holder.image_id) == ("holder", EngineState.CREATED, source.image_id)
    assert {key: holder.labels.get(key) for key in (LABEL_OPERATION, "team")} == {LABEL_OPERATION: "op1", "team": "x"}
    assert (holder.gpu_uuids, holder.ports, holder.cpus, holder.volumes) == ((), (), 0, {})
    with pytest.raises(EngineRejected):
        await engine.create_file_holder(box, "holder", {LABEL_OPERATION: "op2"})
    with pytest.raises(EngineRejected):
        await engine.create_file_holder("nonesuch", "other", {LABEL_OPERATION: "op1"})


# ---- start, stop, pause, wait, remove ----


async def test_starting_what_runs_is_a_success(engine: Engine, subject: Subject) -> None:
    box = await subject.running()
    before = await seen(engine, box)
    assert before.state is EngineState.RUNNING
    await engine.start(box)
    assert (await seen(engine, box)).start_time == before.start_time


async def test_start_of_what_is_gone_or_paused(engine: Engine, subject: Subject) -> None:
    with pytest.raises(EngineRejected):
        await engine.start("nonesuch")
    box = await subject.running()
    await engine.pause(box)
    with pytest.raises(EngineRejected, match="paused"):
        await engine.start(box)
    assert await subject.state(box) is EngineState.PAUSED


async def test_a_port_of_another_container(engine: Engine, subject: Subject) -> None:
    ports = (PortBinding(container_port=80, host_port=18_123),)
    await subject.running("first", ports=ports)
    box = await subject.create("second", ports=ports)
    with pytest.raises(PortInUse):
        await engine.start(box)
    assert not (await seen(engine, box)).alive


async def test_stop(engine: Engine, subject: Subject) -> None:
    box = await subject.running(command=IDLE)
    for _ in range(2):
        await engine.stop(box, 10)
        assert await subject.state(box) is EngineState.EXITED
    await engine.stop("nonesuch", 10)
    await engine.start(box)
    assert await subject.state(box) is EngineState.RUNNING, "what was stopped can be started again"
    for _ in range(2):
        await engine.stop(box, 0)
        assert await subject.state(box) is EngineState.EXITED
    await engine.stop("nonesuch", 0)


async def test_stop_of_what_never_ran_changes_nothing(engine: Engine, subject: Subject) -> None:
    box = await subject.create()
    await engine.stop(box, 10)
    await engine.stop(box, 0)
    assert await subject.state(box) is EngineState.CREATED


@pytest.mark.parametrize("seconds", [0, 1])
async def test_what_is_paused_can_be_stopped(engine: Engine, subject: Subject, seconds: float) -> None:
    box = await subject.running()
    await engine.pause(box)
    await engine.stop(box, seconds)
    assert not (await seen(engine, box)).running


async def test_pause(engine: Engine, subject: Subject) -> None:
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


async def test_exited_within(engine: Engine, subject: Subject) -> None:
    living = await subject.running("living")
    assert await engine.exited_within(living, 0.1) is None
    box = await subject.running_to_exit(7)
    for _ in range(2):
        assert await engine.exited_within(box, 60) == 7
    assert (await seen(engine, box)).exit_code == 7
    assert await engine.exited_within(await subject.create("never-ran"), 60) == 0


async def test_waiting_for_what_is_gone_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineRejected):
        await engine.exited_within("nonesuch", 1)


async def test_limits_and_policy_change_in_place(engine: Engine, subject: Subject) -> None:
    box = await subject.running()
    await engine.update(box, cpus=0, memory_bytes=0)
    assert (await seen(engine, box)).cpus == 0
    policy = RestartPolicy(kind=RestartPolicyKind.ON_FAILURE, max_retry_count=3)
    await engine.update(box, cpus=1, memory_bytes=64 * MIB, restart_policy=policy)
    for _ in range(2):
        container = await seen(engine, box)
        assert (container.cpus, container.memory_bytes, container.restart_policy) == (1, 64 * MIB, policy)
        await engine.update(box, cpus=1, memory_bytes=64 * MIB)
    await engine.stop(box, 0)
    await engine.update(box, cpus=2, memory_bytes=64 * MIB)
    assert (await seen(engine, box)).cpus == 2, "also of what does not run"


async def test_an_update_of_what_is_gone_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineRejected):
        await engine.update("nonesuch", cpus=1, memory_bytes=0)


async def test_rename(engine: Engine, subject: Subject) -> None:
    box, other = await subject.create("box"), await subject.create("other")
    for _ in range(2):
        await engine.rename(box, "better")
        assert (await seen(engine, "better")).id == box
        assert await engine.inspect("box") is None
    with pytest.raises(EngineRejected):
        await engine.rename(box, "other")
    assert (await seen(engine, box)).name == "better"
    assert (await seen(engine, "other")).id == other
    with pytest.raises(EngineRejected):
        await engine.rename("nonesuch", "new")


async def test_remove(engine: Engine, subject: Subject) -> None:
    box = await subject.running()
    await asyncio.gather(*(engine.remove(box) for _ in range(4)))
    assert await engine.inspect(box) is None
    await engine.remove(box)
    await engine.remove("nonesuch")
    assert await subject.create() != box, "its name is free again"


async def test_a_removed_container_leaves_its_volumes_unless_told_to_take_its_own(
    engine: Engine, subject: Subject
) -> None:
    target = subject.volume_target
    first = await subject.create("first", image=subject.volume_image)
    made = (await seen(engine, first)).volumes[target]
    shown = await engine.inspect_volume(made)
    assert shown is not None
    assert shown.anonymous
    heir = await subject.create("heir", image=subject.volume_image, volumes={target: made})
    assert (await seen(engine, heir)).volumes == {target: made}
    await engine.remove(heir, own_volumes=True)
    assert await engine.has_volume(made), "it was given to that one by its name"
    await engine.remove(first)
    assert await engine.has_volume(made), "volumes stay"
    third = await subject.create("third", image=subject.volume_image)
    own = (await seen(engine, third)).volumes[target]
    for _ in range(2):
        await engine.remove(third, own_volumes=True)
        assert not await engine.has_volume(own)
    await engine.remove_volume(made)


# ---- events, exec ----


async def test_events_are_told_from_a_time_on(engine: Engine, subject: Subject) -> None:
    box = await subject.running()
    start = (await seen(engine, box)).create_time
    assert start is not None
    async with asyncio.timeout(60):
        stream = engine.events(int(start.timestamp()) * 10**9)
        told = await anext(stream)
        while told.engine_id != box:
            told = await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]  # an async generator, which the protocol does not promise
    assert told.kind is EngineEventKind.START
    assert told.labels[LABEL_UID] == "uid-box"


async def test_exec(engine: Engine, subject: Subject) -> None:
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


async def test_exec_in_what_does_not_run_is_refused(engine: Engine, subject: Subject) -> None:
    box = await subject.create()
    for engine_id in (box, "nonesuch"):
        with pytest.raises(EngineRejected):
            await engine.exec(engine_id, ExecRequest(command=("true",)))
