"""DockerEngine on a real engine: images, commits and pulls."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.errors import (
    ImagePullFailed,
)
from gpudock_server.model.engine import (
    RegistryAuth,
)

from tests.calls import IDLE, IMAGE
from tests.engine.docker_fixtures import (
    engine,
    labels_without_spec,
    run_shell,
)
from tests.engine.docker_registry import LAYER_BYTES, SECRET, USER, registry
from tests.engine.engine_examples import engine_spec, start_container
from tests.rig import CUDA_LIKE, Rig

__all__ = ["engine"]


async def test_an_image_has_its_config_and_size(engine: DockerEngine) -> None:
    image = await engine.image(CUDA_LIKE)
    assert image is not None
    assert "NVIDIA_VISIBLE_DEVICES=all" in image.env
    assert image.volumes == ("/data",)
    assert image.size_bytes > 0


@pytest.mark.parametrize(
    "reference", ["nonesuch", "nonesuch:x", "UPPER", "../containers", "a/../../info", "", "a?b", "a b", "a//b", "ü"]
)
async def test_a_reference_without_an_image_has_none(engine: DockerEngine, reference: str) -> None:
    assert await engine.image(reference) is None


async def test_commit_keeps_files_and_config(engine: DockerEngine, rig: Rig) -> None:
    gpus = (rig.gpus.uuids[0],)
    options: dict[str, Any] = {"env": {"A": "b"}, "working_dir": "/tmp", "labels": {"team": "x"}}
    box = await start_container(engine, "box", gpus=gpus, **options)
    await run_shell(rig, "box", "echo kept > /kept; rm /etc/group")
    image_id = await engine.commit(box, "gpudock/layer:op1", {"gpudock.operation": "op9"})
    image = await engine.image("gpudock/layer:op1")
    assert image is not None
    assert image.id == image_id
    assert "A=b" in image.env
    assert "NVIDIA_VISIBLE_DEVICES=void" in image.env
    shown = rig.engine.call("GET", f"/images/{image_id}/json")["Config"]
    assert labels_without_spec(shown["Labels"]) == {
        "team": "x",
        "gpudock.uid": "uid-box",
        "gpudock.name": "box",
        "gpudock.operation": "op9",
    }
    assert shown["Cmd"] == list(IDLE)
    assert shown["WorkingDir"] == "/tmp"

    second = dataclasses.replace(await engine_spec(engine, "second", **options), image_id=image_id)
    await engine.start(await engine.create(second))
    assert (
        await run_shell(rig, "second", "cat /kept; ls /etc/group 2>&1 | wc -l; cat /etc/group 2>/dev/null")
        == "kept\n1\n"
    )
    await engine.remove_image("gpudock/layer:op1")
    assert await engine.image(image_id) is not None, "the image of a container was removed"
    await engine.remove("second")
    await engine.remove_image("gpudock/layer:op1")
    await engine.remove_image(image_id)
    await engine.remove_image("../containers")
    assert await engine.image(image_id) is None
    assert await engine.image(IMAGE) is not None


async def test_pull_reports_its_progress(engine: DockerEngine, rig: Rig, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    async with registry(rig, tmp_path, locked=False) as host:
        await engine.pull(f"{host}/whole", None, lambda current, total: progress.append((current, total)))
        image = await engine.image(f"{host}/whole:latest")
        assert image is not None
        assert image.size_bytes >= LAYER_BYTES
        current, total = progress[-1]
        assert current == total > LAYER_BYTES
        assert progress == sorted(progress)
        await engine.remove_image(f"{host}/whole")
        assert await engine.image(f"{host}/whole") is None


async def test_a_pull_from_a_registry_with_a_password(engine: DockerEngine, rig: Rig, tmp_path: Path) -> None:
    async with registry(rig, tmp_path, locked=True) as host:
        image = f"{host}/whole:latest"
        account = RegistryAuth(username=USER, password=SECRET)
        for wrong in (None, dataclasses.replace(account, password="wrong")):  # noqa: S106 - a wrong password
            with pytest.raises(ImagePullFailed):
                await engine.pull(image, wrong, _ignore_progress)
        await engine.pull(image, account, _ignore_progress)
        await engine.remove_image(image)


async def test_a_failed_pull_names_the_image_and_the_cause(engine: DockerEngine, rig: Rig, tmp_path: Path) -> None:
    async with registry(rig, tmp_path, locked=False) as host:
        for reference in (f"{host}/broken", f"{host}/nonesuch", "127.0.0.1:1/x", "UPPER", "", "a b"):
            with pytest.raises(ImagePullFailed) as failed:
                await engine.pull(reference, None, _ignore_progress)
            assert failed.value.image == reference
            assert failed.value.detail


def _ignore_progress(_current: int, _total: int) -> None:
    pass
