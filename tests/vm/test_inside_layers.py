"""In the VM: writable layers with quotas, which are copied if the kernel does not exchange them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpudock_server.adapters.layers import OverlayLayerStore
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import LayerTransferMethod

from tests.calls import Caller
from tests.conftest import FAST_FLAGS
from tests.rig import HttpStatusError, Rig

from . import quotas
from .conftest import QuotaFilesystem, Shell, run_container
from .machine import XFS


def _stopped(rig: Rig, container: str) -> EngineContainer:
    rig.engine.call("POST", f"/containers/{container}/stop", query={"t": "0"})
    shown = rig.engine.call("GET", f"/containers/{container}/json")
    return EngineContainer(
        id=container,
        name=shown["Name"],
        image_id=shown["Image"],
        state=EngineState(shown["State"]["Status"]),
        pid=0,
        exit_code=0,
        oom_killed=False,
        error="",
        labels={},
        gpu_uuids=(),
        upper_dir=shown["GraphDriver"]["Data"]["UpperDir"],
        storage_driver=shown["GraphDriver"]["Name"],
    )


async def test_layers_of_different_projects_are_copied(clean_engine: Rig, quota_filesystem: QuotaFilesystem) -> None:
    first = run_container(clean_engine)
    assert first("rm /etc/group; mkdir /kept; echo kept > /kept/file; ln /kept/file /kept/link") == "0\n"
    old = _stopped(clean_engine, first.container)
    new = _stopped(clean_engine, run_container(clean_engine).container)
    if quota_filesystem.name != XFS:  # on XFS the engine has assigned a project to each layer
        for number, layer in enumerate((old, new), 4001):
            quotas.assign_project(Path(layer.upper_dir).parent, number)

    store = OverlayLayerStore(None, clean_engine.engine.call("GET", "/info")["DockerRootDir"], local=True)
    assert (await store.plan(old)).method is LayerTransferMethod.EXCHANGE
    pair = await store.locate(old, new)
    assert not await store.exchange(pair)
    assert (_inode(old.upper_dir), _inode(new.upper_dir)) == (pair.old_inode, pair.new_inode)
    await store.copy(pair, lambda _current, _total: None)

    clean_engine.engine.call("POST", f"/containers/{new.id}/start")
    second = Shell(clean_engine, new.id)
    assert second("cat /kept/file; stat -c %h /kept/link; ls /etc/group") == (
        "kept\n2\nls: /etc/group: No such file or directory\n1\n"
    )


async def test_a_scale_keeps_files_by_copy_on_xfs_and_by_exchange_on_ext4(
    clean_engine: Rig, quota_filesystem: QuotaFilesystem
) -> None:
    """On XFS each layer has a quota and is copied; on ext4 it has none and is exchanged."""
    daemon = await clean_engine.start_daemon(*FAST_FLAGS)
    async with Caller(daemon.target) as caller:
        container = await caller.create("kept", 1)
        await caller.shell("kept", "echo kept > /root/file && rm /etc/group")
        before = _layer_inode(clean_engine, container.status.engine_id)
        container = await caller.scale("kept", 2)
        output = await caller.shell("kept", "cat /root/file; test ! -e /etc/group && echo gone; ls -1 /dev/nvidia[0-9]")
        assert output == "kept\ngone\n/dev/nvidia0\n/dev/nvidia1\n"
        exchanged = _layer_inode(clean_engine, container.status.engine_id) == before
        assert exchanged == (quota_filesystem.name != XFS)
        await caller.delete_all()
    assert daemon.stop() == 0, daemon.log_text


def _layer_inode(rig: Rig, container: str) -> int:
    shown = rig.engine.call("GET", f"/containers/{container}/json")
    return _inode(shown["GraphDriver"]["Data"]["UpperDir"])


def _inode(path: str) -> int:
    return Path(path).stat().st_ino


def test_the_engine_limits_layers_on_xfs_and_refuses_that_on_ext4(
    clean_engine: Rig, quota_filesystem: QuotaFilesystem
) -> None:
    options = {"size": "32M"}
    if quota_filesystem.name != XFS:
        with pytest.raises(HttpStatusError, match=re.escape("--storage-opt is supported only for overlay over xfs")):
            run_container(clean_engine, StorageOpt=options)
        return
    shell = run_container(clean_engine, StorageOpt=options)
    assert shell("df -P -k / | tail -n 1").split()[1] == "32768"
    assert quota_filesystem.full_message in shell("dd if=/dev/zero of=/file bs=64k count=640 conv=fsync 2>&1")
    assert shell("stat -c %s /file | grep -c '^3[0-9]\\{7\\}$'") == "1\n0\n"
