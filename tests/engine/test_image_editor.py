"""ImageEditor on a real engine: layers are merged and configurations replaced, and the files stay the same."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.errors import DiskFull, EngineRejected, LayerCarryFailed
from gpudock_server.model.engine import EngineImage

from tests.calls import IMAGE
from tests.engine.docker_fixtures import connect_engine, engine, run_shell
from tests.engine.engine_api import create_container, run_in_container, start_container
from tests.engine.sample_trees import TreeEntry, create_tree_command, image_files, read_tree, tree_differences
from tests.rig import EngineProxy, Rig
from tests.rig.images import GLIBC

__all__ = ["engine"]

FILES = 1500
BASE = "gpudock/deep:base"
OTHER = "gpudock/deep:other"
# Overlayfs also counts hard links that an upper layer has replaced.
IGNORED_FIELDS = frozenset({"nlink"})
# Scripts that run one after the other, each committed as a layer above that with the sample tree.
CHANGES = (
    # Delete files of the base and of a layer; delete folders and create them again, which makes them opaque.
    "rm -rf /image/kept /grown/d7; mkdir /image/kept; echo new >/image/kept/new; rm /image/edited/3 /grown/d1/f1",
    # Write to one hard link of a file and delete another; link to a file of a lower layer.
    "echo other >/grown/links/0-0; rm /grown/d1/f2; ln /grown/d2/f3 /crosslink; chmod 4755 /grown/d4/f1",
    # Replace a file by a folder, and a folder by a file.
    "rm /image/edited/4; mkdir /image/edited/4; echo in >/image/edited/4/in; rm -rf /grown/deep; echo f >/grown/deep",
    # Change the opaque folder again, and create deleted files again.
    "echo more >/image/kept/more; rm /image/kept/new; rm -rf /grown/d8; echo back >/image/edited/3; mkdir /grown/d7",
    "rm /image/kept/more; touch /image/kept/last; rm -rf /grown/deep; mkdir /grown/deep; chown 5:6 /grown/d9",
    "mv /grown/sparse /moved; rm -rf /image/replaced; ln -s nowhere /image/replaced",
)


async def create_layered_image(engine: DockerEngine, rig: Rig) -> EngineImage:
    """Create an image with a layer for the sample tree and one for each of CHANGES."""
    rig.images.derive(BASE, GLIBC, files=image_files())
    image = await inspect_image(engine, BASE)
    for number, change in enumerate(("true", *CHANGES)):
        name = f"step{number}"
        _create_and_start(rig, name, image.id)
        if not number:
            run_in_container(rig, name, create_tree_command(files=FILES))
        await run_shell(rig, name, change)
        image = await inspect_image(engine, await engine.commit(name, f"gpudock/deep:{number}", {}))
        await engine.remove(name)
    return image


async def inspect_image(engine: DockerEngine, reference: str) -> EngineImage:
    image = await engine.image(reference)
    assert image is not None
    return image


def _create_and_start(rig: Rig, name: str, image: str) -> None:
    start_container(rig, create_container(rig, image, name=name))


async def container_tree(engine: DockerEngine, rig: Rig, image: str) -> dict[bytes, TreeEntry]:
    """The entries that a container of an image has, without the root folder, which differs in each container."""
    _create_and_start(rig, "reader", image)
    container = await engine.inspect("reader")
    assert container is not None
    tree = read_tree(f"/proc/{container.pid}/root")
    await engine.remove("reader")
    del tree[b"/"]
    return tree


@pytest.mark.deep
async def test_a_merged_layer_has_the_same_files_as_the_layers_before(engine: DockerEngine, rig: Rig) -> None:
    layered = await create_layered_image(engine, rig)
    base = await inspect_image(engine, BASE)
    before = await container_tree(engine, rig, layered.id)
    assert before[b"/grown/d3/f1"].xattrs["security.capability"]
    assert before[b"/grown/d4/f1"].mode == "0o4755"
    assert b"/crosslink" in before

    flat_id = await engine.flatten(layered.id, len(base.layers), "gpudock/flat:test", config_of=BASE)
    flattened_image = await inspect_image(engine, "gpudock/flat:test")
    assert flattened_image.id == flat_id
    assert flattened_image.layers[:-1] == base.layers
    assert len(flattened_image.layers) == len(base.layers) + 1 < len(layered.layers)
    assert (
        tree_differences(before, await container_tree(engine, rig, flattened_image.id), ignored_fields=IGNORED_FIELDS)
        == ""
    )
    assert run_config(rig, flattened_image.id) == run_config(rig, BASE)
    assert rig.engine.call("GET", f"/images/{flattened_image.id}/history")[0]["Comment"] == "7 layers merged"

    # A flattened image can be flattened again.
    again = await engine.flatten(
        flattened_image.id, len(base.layers), "gpudock/flat:again", config_of=flattened_image.id
    )
    assert tree_differences(before, await container_tree(engine, rig, again), ignored_fields=IGNORED_FIELDS) == ""


async def test_changes_are_moved_onto_another_base(engine: DockerEngine, rig: Rig) -> None:
    rig.images.derive(BASE, IMAGE, files={"old": b"old", "both/old": b"", "both/kept": b"", "etc/base": b"1"})
    rig.images.derive(OTHER, IMAGE, files={"new": b"new", "both/new": b"", "both/kept": b"", "etc/other": b"2"})
    base, other = await inspect_image(engine, BASE), await inspect_image(engine, OTHER)
    _create_and_start(rig, "box", BASE)
    await run_shell(rig, "box", "rm /old /both/old; echo mine > /both/mine; echo a > /etc/mine")
    first = await engine.commit("box", "gpudock/deep:one", {})
    _create_and_start(rig, "box2", first)
    await run_shell(rig, "box2", "rm -rf /both/kept /etc/group; echo b >> /etc/mine")
    second = await engine.commit("box2", "gpudock/deep:two", {})

    await engine.flatten(second, len(base.layers), "gpudock/graft:test", config_of=OTHER, onto=OTHER)
    grafted = await inspect_image(engine, "gpudock/graft:test")
    assert grafted.layers[:-1] == other.layers
    _create_and_start(rig, "grafted", grafted.id)
    output = await run_shell(rig, "grafted", "ls /both; cat /etc/mine; ls /etc/group /etc/other /new /old")
    assert output.splitlines()[:4] == ["mine", "new", "a", "b"]
    assert "/etc/other" in output
    assert "/new" in output
    assert "/etc/group: No such file" in output
    assert "/old: No such file" in output
    assert run_config(rig, grafted.id) == run_config(rig, OTHER)


async def test_an_image_keeps_its_layers_and_gets_the_configuration_of_another(engine: DockerEngine, rig: Rig) -> None:
    changes = ["ENV A=1 B=2", 'CMD ["one"]', "LABEL who=base", "USER 7", "WORKDIR /tmp", "EXPOSE 80", "VOLUME /vol"]
    rig.images.derive(BASE, IMAGE, changes=changes, files={"f": b"1"})
    created = rig.engine.call(
        "POST", "/containers/create",
        query={"name": "box"},
        send={"Image": BASE, "Env": ["A=other", "C=3"], "Cmd": ["second"], "Entrypoint": ["sh"], "Labels": {"l": "m"}},
    )["Id"]  # fmt: skip
    committed = await engine.commit(created, "gpudock/deep:raw", {"gpudock.operation": "x"})
    assert run_config(rig, committed) != run_config(rig, BASE)
    clean = await engine.replace_config(committed, BASE, "gpudock/deep:clean")
    assert run_config(rig, clean) == run_config(rig, BASE)
    assert (await inspect_image(engine, clean)).layers == (await inspect_image(engine, committed)).layers
    assert len(rig.engine.call("GET", f"/images/{clean}/history")) == len(
        rig.engine.call("GET", f"/images/{committed}/history")
    )
    # The new image does not depend on the committed one.
    await engine.remove("box")
    await engine.remove_image("gpudock/deep:raw")
    assert await engine.image(committed) is None
    assert await engine.image("gpudock/deep:clean") is not None


def run_config(rig: Rig, image: str) -> dict[str, Any]:
    """The run settings of an image."""
    answer: dict[str, Any] = rig.engine.call("GET", f"/images/{image}/json")["Config"]
    return answer


@pytest.mark.deep
@pytest.mark.timeout(600)
async def test_an_image_with_the_maximum_of_layers_is_flattened(engine: DockerEngine, rig: Rig) -> None:
    image = base = await inspect_image(engine, IMAGE)
    flattened = 0
    for number in range(130):
        _add_file_to_layer(rig, image.id, number)
        try:
            await engine.commit("link", "gpudock/chain:raw", {})
        except EngineRejected as error:
            assert "max depth exceeded" in error.detail  # noqa: PT017 - only the first error is expected, in an iteration that the engine decides
            assert len(image.layers) > 100
            flattened += 1
            await engine.remove("link")
            await engine.flatten(image.id, len(base.layers), "gpudock/chain:flat", config_of=IMAGE)
            image = await inspect_image(engine, "gpudock/chain:flat")
            assert len(image.layers) == len(base.layers) + 1
            _add_file_to_layer(rig, image.id, number)
            await engine.commit("link", "gpudock/chain:raw", {})
        await engine.remove("link")
        image = await inspect_image(engine, "gpudock/chain:raw")
    assert flattened == 1
    assert sorted(int(name) for name in await _files_in_chain(engine, rig, image.id)) == list(range(130))


def _add_file_to_layer(rig: Rig, image: str, number: int) -> None:
    """Add a file to the writable layer of a container that is not started: a start would mount every layer."""
    rig.engine.call("POST", "/containers/create", query={"name": "link"}, send={"Image": image, "Cmd": ["x"]})
    upper = Path(rig.engine.call("GET", "/containers/link/json")["GraphDriver"]["Data"]["UpperDir"])
    (upper / "chain").mkdir()
    (upper / "chain" / str(number)).touch()


async def _files_in_chain(engine: DockerEngine, rig: Rig, image: str) -> list[str]:
    _create_and_start(rig, "all", image)
    output = await run_shell(rig, "all", "ls /chain")
    await engine.remove("all")
    return output.split()


async def test_invalid_arguments_are_refused_and_leave_no_image(engine: DockerEngine, rig: Rig) -> None:
    rig.images.derive(BASE, IMAGE, files={"f": b"1"})
    layers = len((await inspect_image(engine, BASE)).layers)
    for base_layers in (0, layers, layers + 1, -1):
        with pytest.raises(LayerCarryFailed, match="base_layers must be 1 to"):
            await engine.flatten(BASE, base_layers, "gpudock/never:test", config_of=BASE)
    with pytest.raises(EngineRejected):
        await engine.flatten("gpudock/none:such", 1, "gpudock/never:test", config_of=BASE)
    with pytest.raises(EngineRejected):
        await engine.replace_config(BASE, "gpudock/none:such", "gpudock/never:test")
    assert await engine.image("gpudock/never:test") is None


async def test_a_corrupt_saved_image_is_reported(
    engine: DockerEngine, clean_engine: Rig, engine_proxy: EngineProxy
) -> None:
    rig = clean_engine
    rig.images.derive(BASE, IMAGE, files={"f": b"1"})
    image = await inspect_image(engine, BASE)
    engine_proxy.faults.fail("GET", r"/images/.*/get", status=200, message="this is no tar")
    async with connect_engine(engine_proxy.url, timeout=20) as proxied_engine:
        with pytest.raises(LayerCarryFailed, match="saved image is corrupt"):
            await proxied_engine.flatten(image.id, len(image.layers) - 1, "gpudock/never:test", config_of=BASE)
        # The next call succeeds.
        await proxied_engine.flatten(image.id, len(image.layers) - 1, "gpudock/again:test", config_of=BASE)


async def test_a_full_disk_is_reported_before_the_image_is_saved(
    engine: DockerEngine, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.images.derive(BASE, IMAGE, files={"f": b"1" * 5000})
    image = await inspect_image(engine, BASE)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DiskFull) as error:
        await engine.flatten(image.id, len(image.layers) - 1, "gpudock/never:test", config_of=BASE)
    assert error.value.needed_bytes > 10_000
    assert error.value.available_bytes == 1000


async def test_a_cancelled_flatten_ends_immediately_and_leaves_nothing(
    clean_engine: Rig, engine_proxy: EngineProxy, tmp_path: Path
) -> None:
    rig = clean_engine
    rig.images.derive(BASE, IMAGE, files={"f": b"1"})
    held = engine_proxy.faults.hang("POST", "/images/load")
    engine = await DockerEngine.connect(engine_proxy.url, scratch_dir=tmp_path)
    image = await inspect_image(engine, BASE)
    flatten = asyncio.ensure_future(
        engine.flatten(image.id, len(image.layers) - 1, "gpudock/cancelled:test", config_of=BASE)
    )
    await held.hit.wait()
    flatten.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flatten
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - Path.iterdir is refused by ASYNC240
    engine_proxy.faults.clear()
    assert await engine.image("gpudock/cancelled:test") is None
    await engine.close()
