"""The three methods to transfer a writable layer, with containers of a real engine, and what each method refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from gpudock_server.adapters.layers import OverlayLayerStore
from gpudock_server.errors import LayerCarryFailed
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.operation import LayerTransferMethod

from tests.engine.drift import engine_action
from tests.engine.engine_api import create_container, engine_container, run_in_container
from tests.engine.sample_trees import (
    TreeEntry,
    create_tree_command,
    image_files,
    read_tree,
    tree_differences,
)
from tests.engine.snapshot_host import ignore_progress
from tests.rig.images import GLIBC
from tests.rig.rig import Rig

IMAGE = "gpudock/tree:test"
MIB = 1 << 20
FILES = 1500
_FIELDS = {field.name for field in dataclasses.fields(TreeEntry)}


def _create(rig: Rig, image: str = IMAGE) -> EngineContainer:
    return engine_container(rig, create_container(rig, image))


def _after_action(rig: Rig, container: EngineContainer, action: str) -> EngineContainer:
    engine_action(rig, container.id, action)
    return engine_container(rig, container.id)


def _read_container(container: EngineContainer) -> dict[bytes, TreeEntry]:
    return read_tree(f"/proc/{container.pid}/root")


def _layer_store(rig: Rig, forced: LayerTransferMethod | None = None) -> OverlayLayerStore:
    return OverlayLayerStore(forced, rig.engine.call("GET", "/info")["DockerRootDir"], local=True)


@contextmanager
def _stopped_container_with_tree(rig: Rig, files: int) -> Iterator[tuple[EngineContainer, dict[bytes, TreeEntry]]]:
    """A stopped container with a sample tree, and the entries that it had inside; all containers are removed."""
    rig.images.derive(IMAGE, GLIBC, files=image_files())
    try:
        container = _after_action(rig, _create(rig), "start")
        run_in_container(rig, container.id, create_tree_command(files=files))
        # Read after a second start, because the engine changes files at each start.
        _after_action(rig, container, "stop?t=0")
        entries = _read_container(_after_action(rig, container, "start"))
        yield _after_action(rig, container, "stop?t=0"), entries
    finally:
        rig.engine.remove_all()


def _assert_container_has(rig: Rig, container: EngineContainer, before: dict[bytes, TreeEntry]) -> None:
    """Start a container, compare the entries inside with `before`, and stop it."""
    assert tree_differences(before, _read_container(_after_action(rig, container, "start"))) == ""
    _after_action(rig, container, "stop?t=0")


@pytest.mark.deep
async def test_exchange_and_copy_transfer_twenty_thousand_files_unchanged(rig: Rig) -> None:
    with _stopped_container_with_tree(rig, 20_000) as (first, before):
        assert len(before) > 20_000
        store = _layer_store(rig)
        assert (await store.plan(first)).method is LayerTransferMethod.EXCHANGE

        second = _create(rig)
        pair = await store.locate(first, second)
        for _ in range(2):
            assert await store.exchange(pair)
        _assert_container_has(rig, second, before)
        for _ in range(2):
            await store.exchange_back(pair)

        store = _layer_store(rig, LayerTransferMethod.COPY)
        plan = await store.plan(first)
        assert plan.method is LayerTransferMethod.COPY
        assert plan.bytes_available > plan.bytes_to_move > 20_000 * 4096
        third = _create(rig)
        calls: list[tuple[int, int]] = []
        await store.copy(await store.locate(first, third), lambda current, total: calls.append((current, total)))
        assert calls == sorted(calls)
        assert calls[0] == (0, plan.bytes_to_move)
        assert calls[-1] == (plan.bytes_to_move, plan.bytes_to_move)
        _assert_container_has(rig, third, before)


async def test_a_repeated_copy_is_equal(rig: Rig) -> None:
    with _stopped_container_with_tree(rig, FILES) as (old, before):
        store = _layer_store(rig, LayerTransferMethod.COPY)
        new = _create(rig)
        pair = await store.locate(old, new)
        for _ in range(2):
            await store.copy(pair, ignore_progress)
        _assert_container_has(rig, new, before)


@pytest.mark.deep
async def test_a_commit_loses_what_its_plan_says_and_no_more(rig: Rig) -> None:
    with _stopped_container_with_tree(rig, FILES) as (old, before):
        plan = await _layer_store(rig, LayerTransferMethod.COMMIT).plan(old)
        assert plan.method is LayerTransferMethod.COMMIT
        assert plan.bytes_to_move > 48 * MIB, "a commit writes out sparse files"
        committed = rig.engine.call("POST", "/commit", query={"container": old.id}, send={})["Id"]
        after = _read_container(_after_action(rig, _create(rig, committed), "start"))
        warnings = " ".join(plan.warnings)
        for lost, warning in {"xattrs": "user.*", "mtime_ns": "whole seconds", "sparse": "sparse"}.items():
            assert warning in warnings
            assert tree_differences(before, after, ignored_fields=frozenset(_FIELDS - {lost}))
        sockets = {path for path, entry in before.items() if entry.kind == "s"}
        assert sockets
        assert "sockets" in warnings
        assert "time of /," in warnings
        kept = {path: entry for path, entry in before.items() if path not in sockets | {b"/"}}
        del after[b"/"]
        assert tree_differences(kept, after, ignored_fields=frozenset({"xattrs", "mtime_ns", "sparse"})) == ""
        for path, entry in kept.items():
            assert abs(after[path].mtime_ns - entry.mtime_ns) < 10**9 or entry.mtime_ns < 0
            assert set(entry.xattrs) - set(after[path].xattrs) <= {name for name in entry.xattrs if "user." in name}


async def test_containers_that_are_not_two_stopped_ones_of_one_image_are_refused(rig: Rig) -> None:
    rig.images.derive(IMAGE, GLIBC, files={"image": b""})
    rig.images.derive("gpudock/other:test", GLIBC, files={"image": b"other"})
    try:
        store, old, new, other = _layer_store(rig), _create(rig), _create(rig), _create(rig, "gpudock/other:test")
        await store.locate(old, new)
        below = rig.engine.call("GET", f"/containers/{old.id}/json")["GraphDriver"]["Data"]["LowerDir"].split(":")
        for wrong in (
            old,
            other,
            _changed(other, image_id=new.image_id),  # the same image id, but other lower layers
            _changed(new, image_id=""),
            _changed(new, upper_dir=""),
            _changed(new, upper_dir="/"),
            _changed(new, upper_dir=below[0]),  # an init layer
            _changed(new, upper_dir=below[1]),  # an image's layer
            _changed(new, upper_dir=f"{new.upper_dir}/.."),
            _changed(new, storage_driver="overlayfs"),
        ):
            with pytest.raises(LayerCarryFailed):
                await store.locate(old, wrong)
            with pytest.raises(LayerCarryFailed):
                await store.locate(wrong, old)
    finally:
        rig.engine.remove_all()


async def test_an_inaccessible_layer_is_transferred_by_commit(rig: Rig) -> None:
    rig.images.derive(IMAGE, GLIBC, files={"image": b""})
    try:
        container = _create(rig)
        root = str(rig.engine.data_root)
        for store, inaccessible in (
            (OverlayLayerStore(None, root, local=False), container),
            (OverlayLayerStore(None, "/nowhere", local=True), container),
            (OverlayLayerStore(None, root, local=True), _changed(container, upper_dir="", storage_driver="overlayfs")),
        ):
            plan = await store.plan(inaccessible)
            assert (plan.method, plan.bytes_to_move) == (LayerTransferMethod.COMMIT, 0)
            assert plan.warnings[0].startswith("EXCHANGE is not possible: ")
        for forced in (LayerTransferMethod.EXCHANGE, LayerTransferMethod.COPY):
            with pytest.raises(LayerCarryFailed, match="another host"):
                await OverlayLayerStore(forced, root, local=False).plan(container)
        assert dict(await OverlayLayerStore(None, root, local=False).methods()) == {
            LayerTransferMethod.EXCHANGE: "the engine runs on another host",
            LayerTransferMethod.COPY: "the engine runs on another host",
            LayerTransferMethod.COMMIT: "",
        }
    finally:
        rig.engine.remove_all()


def _changed(container: EngineContainer, **changes: Any) -> EngineContainer:
    return dataclasses.replace(container, **changes)
