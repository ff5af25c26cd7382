"""ports.Engine: images and engine volumes."""

from __future__ import annotations

import pytest
from gpudock_server.errors import EngineRejected, ImagePullFailed, VolumeExists
from gpudock_server.model.engine import LABEL_OPERATION, LABEL_UID
from gpudock_server.model.spec import Mount
from gpudock_server.ports import Engine

from tests.contracts.engine_subject import EngineSubject
from tests.engine.engine_examples import inspect_container

pytest_plugins = ["tests.contracts.engine_fixtures"]

OTHERS_UID = "uid-other"

_NO_IMAGES = "FakeEngine has one image, and invents ids for new ones"
NOT_FAKED = {
    "fake": {
        "test_a_commit_adds_one_layer_and_the_name": _NO_IMAGES,
        "test_a_commit_of_an_unchanged_container_adds_no_layer": _NO_IMAGES,
        "test_a_name_moves_from_one_image_to_another": _NO_IMAGES,
        "test_an_image_in_use_is_not_removed": _NO_IMAGES,
        "test_images_are_derived_from_others": _NO_IMAGES,
        "test_a_failed_pull_is_an_error": "FakeEngine pulls every image",
        "test_the_containers_that_mount_an_engine_volume_are_found": "FakeEngine keeps no mounts",
    }
}


@pytest.fixture
def subject(any_engine: EngineSubject) -> EngineSubject:
    return any_engine


@pytest.fixture
def engine(subject: EngineSubject) -> Engine:
    return subject.engine


# ---- images ----


async def test_an_image_is_found_by_name_and_by_id(engine: Engine, subject: EngineSubject) -> None:
    image = await engine.image(subject.image)
    assert image is not None
    assert await engine.image(image.id) == image
    assert subject.image in await engine.image_names()
    assert image.id in await engine.image_ids()
    assert await engine.image("nonesuch") is None
    assert await engine.image("sha256:" + "0" * 64) is None


async def test_a_failed_pull_is_an_error(engine: Engine) -> None:
    with pytest.raises(ImagePullFailed) as failed:
        await engine.pull("127.0.0.1:1/nonesuch", None, lambda _current, _total: None)
    assert failed.value.image == "127.0.0.1:1/nonesuch"


async def test_a_commit_adds_one_layer_and_the_name(engine: Engine, subject: EngineSubject) -> None:
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


async def test_a_commit_of_an_unchanged_container_adds_no_layer(engine: Engine, subject: EngineSubject) -> None:
    base = await engine.image(subject.image)
    assert base is not None
    made = await engine.commit(await subject.create(), "gpudock/contract:same", {})
    image = await engine.image(made)
    await engine.remove_image("gpudock/contract:same")
    assert image is not None
    assert image.layers == base.layers
    assert image.id != base.id


async def test_a_name_moves_from_one_image_to_another(engine: Engine, subject: EngineSubject) -> None:
    first, other = await engine.image(subject.image), await engine.image(subject.volume_image)
    assert first is not None
    assert other is not None
    try:
        for image in (first, first, other):
            await engine.tag(image.id, "gpudock/contract:moves")
            assert await engine.image("gpudock/contract:moves") == image
    finally:
        for _ in range(2):
            await engine.remove_image("gpudock/contract:moves")
    assert await engine.image("gpudock/contract:moves") is None
    assert await engine.image(subject.volume_image) == other, "more than the name was removed"
    with pytest.raises(EngineRejected):
        await engine.tag("nonesuch", "gpudock/contract:moves")


async def test_an_image_in_use_is_not_removed(engine: Engine, subject: EngineSubject) -> None:
    source = await subject.create()
    made = await engine.commit(source, "gpudock/contract:used", {})
    box = await subject.create("user", image="gpudock/contract:used")
    await engine.remove_image("gpudock/contract:used")
    assert await engine.image(made) is not None
    await engine.remove(box)
    await engine.remove_image("gpudock/contract:used")
    await engine.remove_image(made)
    assert await engine.image(made) is None


async def test_images_are_derived_from_others(engine: Engine, subject: EngineSubject) -> None:
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


async def test_creating_an_engine_volume_again_succeeds(engine: Engine) -> None:
    labels = {LABEL_UID: "uid-1", "team": "x"}
    made = await engine.create_volume("own", labels=labels, driver_options={})
    assert await engine.create_volume("own", labels=labels, driver_options={}) == made
    assert await engine.inspect_volume("own") == made
    assert "own" in await engine.volume_names()
    assert (made.name, made.driver, made.labels) == ("own", "local", labels)
    for theirs, options in (({LABEL_UID: OTHERS_UID}, {}), (labels, {"type": "tmpfs", "device": "tmpfs"})):
        with pytest.raises(VolumeExists):
            await engine.create_volume("own", labels=theirs, driver_options=options)
    assert await engine.inspect_volume("own") == made, "the existing volume was changed"
    for _ in range(2):
        await engine.remove_volume("own")
    assert await engine.inspect_volume("own") is None
    assert "own" not in await engine.volume_names()


async def test_engine_volumes_are_found_by_all_of_their_labels(engine: Engine) -> None:
    for name, team in (("v1", "x"), ("v2", "y")):
        await engine.create_volume(name, labels={LABEL_UID: f"uid-{name}", "team": team}, driver_options={})
    for labels, names in (
        ({"team": "x"}, {"v1"}),
        ({"team": "y", LABEL_UID: "uid-v2"}, {"v2"}),
        ({"team": "x", LABEL_UID: "uid-v2"}, set()),
    ):
        assert {volume.name for volume in await engine.find_volumes(labels)} == names


async def test_the_containers_that_mount_an_engine_volume_are_found(engine: Engine, subject: EngineSubject) -> None:
    await engine.create_volume("v1", labels={LABEL_UID: "uid-v1"}, driver_options={})
    assert await engine.mounting("v1") == ()
    box = await subject.create(mounts=(Mount(volume="v1", target="/v"),))
    assert (await inspect_container(engine, box)).volumes["/v"] == "v1"
    assert [container.id for container in await engine.mounting("v1")] == [box]
    assert await engine.mounting("nonesuch") == ()
    with pytest.raises(EngineRejected, match="in use"):
        await engine.remove_volume("v1")
    await engine.remove(box)
    assert await engine.inspect_volume("v1"), "the volume was removed with its container"
    await engine.remove_volume("v1")
