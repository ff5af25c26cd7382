"""The choice of a volume backend, volumes without a size, and hosts without project quotas."""

# These tests may block their event loop: no other task runs in it.
# ruff: noqa: ASYNC221, ASYNC240
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.volumes import (
    LoopBackend,
    PlainBackend,
    ProjectQuotaBackend,
)
from gpudock_server.core.volumes.backends import choose_backend
from gpudock_server.errors import (
    SizeNotSupported,
    VolumeFailed,
)
from gpudock_server.model.volume import VolumeBackendKind

from tests.engine.volume_containers import TARGET, volume_container
from tests.engine.volume_fixtures import (
    MIB,
    VOLUME_SIZE,
    create_engine_volume,
    engine,
    new_uid,
    root,
)
from tests.rig import Rig

__all__ = ["engine", "root"]


async def test_the_quota_backend_says_why_it_is_unavailable(rig: Rig, root: Path) -> None:
    quota = ProjectQuotaBackend(root, local=True)
    image = rig.folder / "without-quotas"
    with image.open("wb") as file:
        file.truncate(VOLUME_SIZE)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    root.mkdir()
    for command in (["-t", "tmpfs", "-o", "size=4m", "none"], ["-o", "loop,noquota", str(image)]):
        subprocess.run(["mount", *command, root], check=True)
        try:
            reason = await quota.unavailable_reason()
            with pytest.raises(SizeNotSupported) as raised:
                await quota.create(new_uid(), "data", VOLUME_SIZE)
            assert raised.value.detail == reason
            assert list(root.iterdir()) == []
        finally:
            subprocess.run(["umount", root], check=True)
        if "tmpfs" in command:
            assert reason == f"{root} is on {root} (tmpfs); project quotas need xfs or ext4"
        else:
            assert reason.startswith(f"{root} is on {root} (xfs), which is mounted without project quotas: mount it")
    image.unlink()


async def test_a_plain_volume_has_no_size_and_reports_its_usage(rig: Rig, engine: DockerEngine) -> None:
    plain = PlainBackend(rig.engine.data_root)
    with pytest.raises(SizeNotSupported):
        await plain.create(new_uid(), "data", 1)
    backing = await plain.create(new_uid(), "data", 0)
    volume = await create_engine_volume(engine, backing)
    shown = await engine.inspect_volume(volume)
    assert shown is not None
    with pytest.raises(VolumeFailed, match="is not accessible from this host"):
        await plain.usage(backing)
    backing = backing.model_copy(update={"folder": shown.mountpoint})
    with volume_container(rig, volume) as container:
        container.run("dd", "if=/dev/urandom", f"of={TARGET}/file", "bs=1M", "count=10", "conv=fsync")
        usage = await plain.usage(backing)
        assert 10 * MIB <= usage.used_bytes < 11 * MIB
        assert usage.size_bytes == 0
    for change in (plain.grow, plain.shrink):
        with pytest.raises(SizeNotSupported):
            await change(backing, 20 * MIB)
    await engine.remove_volume(volume)
    await plain.destroy(backing)


async def test_the_best_backend_is_chosen(root: Path) -> None:
    remote_backends = [LoopBackend(root, local=False), PlainBackend(root)]
    local_backends = [LoopBackend(root, local=True), PlainBackend(root)]
    assert (await choose_backend(local_backends, name="data", size_bytes=VOLUME_SIZE)).kind is VolumeBackendKind.LOOP
    assert (await choose_backend(local_backends, name="data", size_bytes=0)).kind is VolumeBackendKind.PLAIN
    with pytest.raises(SizeNotSupported, match="LOOP: the engine runs on another host; PLAIN: does not support a size"):
        await choose_backend(remote_backends, name="data", size_bytes=VOLUME_SIZE)
    with pytest.raises(SizeNotSupported, match="LOOP: available, but not requested; PLAIN: does not support a size"):
        await choose_backend(local_backends, name="data", size_bytes=VOLUME_SIZE, forced=VolumeBackendKind.PLAIN)
    with pytest.raises(SizeNotSupported, match="LOOP: requires a size"):
        await choose_backend(local_backends, name="data", size_bytes=0, forced=VolumeBackendKind.LOOP)
