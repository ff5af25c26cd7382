"""ImageEditor on a real engine: merged layers and other configs, with unchanged files."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.errors import DiskFull, EngineRejected, LayerCarryFailed
from gpudock_server.model.engine import EngineImage

from tests.engine.engine_examples import IMAGE
from tests.engine.sample_trees import TreeEntry, create_tree_command, image_files, read_tree, tree_differences
from tests.engine.test_docker_engine import connected_to, shell
from tests.rig import EngineProxy, Rig
from tests.rig.images import GLIBC

SMALL = 1500
BASE = "gpudock/deep:base"
OTHER = "gpudock/deep:other"
# The engine's file system counts the names of a file also where a layer above has replaced some.
_NOT_THE_IMAGES = frozenset({"nlink"})
# Run in a container one after the other, each committed as a layer; `grow` runs before them.
CHANGES = (
    # Deleted from the base and from a layer; folders emptied and made anew, which makes them opaque.
    "rm -rf /image/kept /grown/d7; mkdir /image/kept; echo new >/image/kept/new; rm /image/edited/3 /grown/d1/f1",
    # One name of a hard-linked file written to, another deleted; a link to a file of a lower layer.
    "echo other >/grown/links/0-0; rm /grown/d1/f2; ln /grown/d2/f3 /crosslink; chmod 4755 /grown/d4/f1",
    # A folder where a file was, a file where a folder was.
    "rm /image/edited/4; mkdir /image/edited/4; echo in >/image/edited/4/in; rm -rf /grown/deep; echo f >/grown/deep",
    # And again: the opaque one filled and emptied, what was deleted is back.
    "echo more >/image/kept/more; rm /image/kept/new; rm -rf /grown/d8; echo back >/image/edited/3; mkdir /grown/d7",
    "rm /image/kept/more; touch /image/kept/last; rm -rf /grown/deep; mkdir /grown/deep; chown 5:6 /grown/d9",
    "mv /grown/sparse /moved; rm -rf /image/replaced; ln -s nowhere /image/replaced",
)


@pytest_asyncio.fixture
async def engine(clean_engine: Rig) -> AsyncIterator[DockerEngine]:
    async with connected_to(clean_engine.engine.url, timeout=60) as connected:
        yield connected


async def layered(engine: DockerEngine, rig: Rig) -> EngineImage:
    """An image with a layer for `grow` and one for each of CHANGES."""
    rig.images.derive(BASE, GLIBC, files=image_files())
    image = await shown(engine, BASE)
    for number, change in enumerate(("true", *CHANGES)):
        name = f"step{number}"
        _start(rig, name, image.id)
        if not number:
            _run(rig, name, create_tree_command(files=SMALL))
        await shell(rig, name, change)
        image = await shown(engine, await engine.commit(name, f"gpudock/deep:{number}", {}))
        await engine.remove(name)
    return image


async def shown(engine: DockerEngine, reference: str) -> EngineImage:
    image = await engine.image(reference)
    assert image is not None
    return image


def _start(rig: Rig, name: str, image: str, command: tuple[str, ...] = ("sleep", "infinity")) -> None:
    made = rig.engine.call("POST", "/containers/create", query={"name": name}, send={"Image": image, "Cmd": command})
    rig.engine.call("POST", f"/containers/{made['Id']}/start")


def _run(rig: Rig, name: str, command: list[str]) -> None:
    made = rig.engine.call("POST", f"/containers/{name}/exec", send={"Cmd": command})["Id"]
    rig.engine.call("POST", f"/exec/{made}/start", send={"Detach": True})
    while (seen := rig.engine.call("GET", f"/exec/{made}/json"))["Running"]:
        time.sleep(0.02)
    assert seen["ExitCode"] == 0


async def inside(engine: DockerEngine, rig: Rig, image: str) -> dict[bytes, TreeEntry]:
    """The files that a container of an image sees."""
    _start(rig, "seen", image)
    seen = await engine.inspect("seen")
    assert seen is not None
    tree = read_tree(f"/proc/{seen.pid}/root")
    await engine.remove("seen")
    # These differ in each container.
    del tree[b"/"]
    return tree


@pytest.mark.deep
async def test_the_one_layer_shows_what_the_many_did(engine: DockerEngine, rig: Rig) -> None:
    deep = await layered(engine, rig)
    base = await shown(engine, BASE)
    before = await inside(engine, rig, deep.id)
    assert before[b"/grown/d3/f1"].xattrs["security.capability"]
    assert before[b"/grown/d4/f1"].mode == "0o4755"
    assert b"/crosslink" in before

    flat_id = await engine.flatten(deep.id, len(base.layers), "gpudock/flat:test", config_of=BASE)
    flat = await shown(engine, "gpudock/flat:test")
    assert flat.id == flat_id
    assert flat.layers[:-1] == base.layers
    assert len(flat.layers) == len(base.layers) + 1 < len(deep.layers)
    assert tree_differences(before, await inside(engine, rig, flat.id), ignored_fields=_NOT_THE_IMAGES) == ""
    assert config(rig, flat.id) == config(rig, BASE)
    assert rig.engine.call("GET", f"/images/{flat.id}/history")[0]["Comment"] == "7 layers merged"

    # Again, from the image that is flat already.
    again = await engine.flatten(flat.id, len(base.layers), "gpudock/flat:again", config_of=flat.id)
    assert tree_differences(before, await inside(engine, rig, again), ignored_fields=_NOT_THE_IMAGES) == ""


async def test_changes_are_grafted_on_another_base(engine: DockerEngine, rig: Rig) -> None:
    rig.images.derive(BASE, IMAGE, files={"old": b"old", "both/old": b"", "both/kept": b"", "etc/base": b"1"})
    rig.images.derive(OTHER, IMAGE, files={"new": b"new", "both/new": b"", "both/kept": b"", "etc/other": b"2"})
    base, other = await shown(engine, BASE), await shown(engine, OTHER)
    _start(rig, "box", BASE)
    await shell(rig, "box", "rm /old /both/old; echo mine > /both/mine; echo a > /etc/mine")
    one = await engine.commit("box", "gpudock/deep:one", {})
    _start(rig, "box2", one)
    await shell(rig, "box2", "rm -rf /both/kept /etc/group; echo b >> /etc/mine")
    two = await engine.commit("box2", "gpudock/deep:two", {})

    await engine.flatten(two, len(base.layers), "gpudock/graft:test", config_of=OTHER, onto=OTHER)
    graft = await shown(engine, "gpudock/graft:test")
    assert graft.layers[:-1] == other.layers
    _start(rig, "grafted", graft.id)
    said = await shell(rig, "grafted", "ls /both; cat /etc/mine; ls /etc/group /etc/other /new /old")
    assert said.splitlines()[:4] == ["mine", "new", "a", "b"]
    assert "/etc/other" in said
    assert "/new" in said
    assert "/etc/group: No such file" in said
    assert "/old: No such file" in said
    assert config(rig, graft.id) == config(rig, OTHER)


async def test_an_image_keeps_its_layers_and_takes_anothers_config(engine: DockerEngine, rig: Rig) -> None:
    changes = ["ENV A=1 B=2", 'CMD ["one"]', "LABEL who=base", "USER 7", "WORKDIR /tmp", "EXPOSE 80", "VOLUME /vol"]
    rig.images.derive(BASE, IMAGE, changes=changes, files={"f": b"1"})
    made = rig.engine.call(
        "POST", "/containers/create",
        query={"name": "box"},
        send={"Image": BASE, "Env": ["A=other", "C=3"], "Cmd": ["two"], "Entrypoint": ["sh"], "Labels": {"l": "m"}},
    )["Id"]  # fmt: skip
    committed = await engine.commit(made, "gpudock/deep:raw", {"gpudock.operation": "x"})
    assert config(rig, committed) != config(rig, BASE)
    clean = await engine.replace_config(committed, BASE, "gpudock/deep:clean")
    assert config(rig, clean) == config(rig, BASE)
    assert (await shown(engine, clean)).layers == (await shown(engine, committed)).layers
    assert len(rig.engine.call("GET", f"/images/{clean}/history")) == len(
        rig.engine.call("GET", f"/images/{committed}/history")
    )
    # The committed image is not needed any more.
    await engine.remove("box")
    await engine.remove_image("gpudock/deep:raw")
    assert await engine.image(committed) is None
    assert await engine.image("gpudock/deep:clean") is not None


def config(rig: Rig, image: str) -> dict[str, Any]:
    """The run settings of an image."""
    answer: dict[str, Any] = rig.engine.call("GET", f"/images/{image}/json")["Config"]
    return answer


@pytest.mark.deep
@pytest.mark.timeout(600)
async def test_where_the_engine_gives_up_a_squash_goes_on(engine: DockerEngine, rig: Rig) -> None:
    image = base = await shown(engine, IMAGE)
    squashed = 0
    for number in range(130):
        _add_file(rig, image.id, number)
        try:
            await engine.commit("link", "gpudock/chain:raw", {})
        except EngineRejected as error:
            assert "max depth exceeded" in error.detail  # noqa: PT017 - where in the chain it is raised is the point
            assert len(image.layers) > 100
            # As many as there are, as one.
            squashed += 1
            await engine.remove("link")
            await engine.flatten(image.id, len(base.layers), "gpudock/chain:flat", config_of=IMAGE)
            image = await shown(engine, "gpudock/chain:flat")
            assert len(image.layers) == len(base.layers) + 1
            _add_file(rig, image.id, number)
            await engine.commit("link", "gpudock/chain:raw", {})
        await engine.remove("link")
        image = await shown(engine, "gpudock/chain:raw")
    assert squashed == 1
    assert sorted(int(name) for name in await _files(engine, rig, image.id)) == list(range(130))


def _add_file(rig: Rig, image: str, number: int) -> None:
    """By hand, in a container that never runs: the engine would mount all layers for an archive with one file."""
    rig.engine.call("POST", "/containers/create", query={"name": "link"}, send={"Image": image, "Cmd": ["x"]})
    upper = Path(rig.engine.call("GET", "/containers/link/json")["GraphDriver"]["Data"]["UpperDir"])
    (upper / "chain").mkdir()
    (upper / "chain" / str(number)).touch()


async def _files(engine: DockerEngine, rig: Rig, image: str) -> list[str]:
    _start(rig, "all", image)
    said = await shell(rig, "all", "ls /chain")
    await engine.remove("all")
    return said.split()


async def test_what_cannot_be_is_refused_and_leaves_nothing(engine: DockerEngine, rig: Rig) -> None:
    rig.images.derive(BASE, IMAGE, files={"f": b"1"})
    layers = len((await shown(engine, BASE)).layers)
    for wrong in (0, layers, layers + 1, -1):
        with pytest.raises(LayerCarryFailed, match="base_layers must be 1 to"):
            await engine.flatten(BASE, wrong, "gpudock/never:test", config_of=BASE)
    with pytest.raises(EngineRejected):
        await engine.flatten("gpudock/none:such", 1, "gpudock/never:test", config_of=BASE)
    with pytest.raises(EngineRejected):
        await engine.replace_config(BASE, "gpudock/none:such", "gpudock/never:test")
    assert await engine.image("gpudock/never:test") is None


async def test_a_saved_image_that_breaks_off_is_told(
    engine: DockerEngine, clean_engine: Rig, engine_proxy: EngineProxy
) -> None:
    rig = clean_engine
    rig.images.derive(BASE, IMAGE, files={"f": b"1"})
    image = await shown(engine, BASE)
    engine_proxy.faults.fail("GET", r"/images/.*/get", status=200, message="this is no tar")
    async with connected_to(engine_proxy.url, timeout=20) as through:
        with pytest.raises(LayerCarryFailed, match="saved image is corrupt"):
            await through.flatten(image.id, len(image.layers) - 1, "gpudock/never:test", config_of=BASE)
        # The next try succeeds.
        await through.flatten(image.id, len(image.layers) - 1, "gpudock/again:test", config_of=BASE)


async def test_no_room_is_told_before_anything_is_fetched(
    engine: DockerEngine, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.images.derive(BASE, IMAGE, files={"f": b"1" * 5000})
    image = await shown(engine, BASE)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DiskFull) as full:
        await engine.flatten(image.id, len(image.layers) - 1, "gpudock/never:test", config_of=BASE)
    assert full.value.needed_bytes > 10_000
    assert full.value.available_bytes == 1000


async def test_a_cancelled_squash_ends_at_once_and_leaves_nothing(
    clean_engine: Rig, engine_proxy: EngineProxy, tmp_path: Path
) -> None:
    rig = clean_engine
    rig.images.derive(BASE, IMAGE, files={"f": b"1"})
    held = engine_proxy.faults.hang("POST", "/images/load")
    engine = await DockerEngine.connect(engine_proxy.url, scratch_dir=tmp_path)
    image = await shown(engine, BASE)
    squash = asyncio.ensure_future(
        engine.flatten(image.id, len(image.layers) - 1, "gpudock/cancelled:test", config_of=BASE)
    )
    await held.hit.wait()
    squash.cancel()
    with pytest.raises(asyncio.CancelledError):
        await squash
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a path is not to be used here, and a listing does not block
    engine_proxy.faults.clear()
    assert await engine.image("gpudock/cancelled:test") is None
    await engine.close()
