"""Assertions about a container, its claims and the engine that must hold whenever no operation is running."""

from __future__ import annotations

from typing import Any

import grpc
from gpudock.v1 import container_pb2

from tests.calls import Caller
from tests.rig import Rig

WRITE_FILES = (
    "mkdir -p /work/deep && echo kept > /work/file && ln /work/file /work/link && rm -f /etc/group"
    " && dd if=/dev/urandom of=/work/deep/data bs=1k count=64 2>/dev/null && chmod 4755 /work/deep/data"
)
SHOW_FILES = (
    "cd /work && stat -c '%n %a %u %s %h' file link deep/data && md5sum file deep/data"
    " && ls /etc | grep -c group || true"
)


def engine_containers(rig: Rig) -> list[dict[str, Any]]:
    """All engine containers, as the engine's inspect call shows them."""
    listed = rig.engine.call("GET", "/containers/json?all=1")
    return [rig.engine.call("GET", f"/containers/{inspected['Id']}/json") for inspected in listed]


def engine_containers_of(rig: Rig, name: str) -> list[dict[str, Any]]:
    """The engine containers of the container `name`, as the engine's inspect call shows them."""
    return [
        inspected for inspected in engine_containers(rig) if inspected["Config"]["Labels"].get("gpudock.name") == name
    ]


def layer_images(rig: Rig) -> set[str]:
    """The names of images with files of containers, also of those that killed daemons of other tests have left."""
    return {name for name in rig.engine.image_ids() if name.startswith("gpudock/layer")}


def bound_host_paths(rig: Rig) -> list[str]:
    """The mount points of host paths that are bound for engine containers."""
    points = [line.split()[1] for line in rig.run("cat", "/proc/self/mounts").stdout.splitlines()]
    return [point for point in points if point.startswith("/run/gpudock-host-paths/")]


def gpus_of(inspected: dict[str, Any]) -> list[str]:
    """The UUIDs of the GPUs of an engine container."""
    requests = inspected["HostConfig"]["DeviceRequests"] or []
    return [uuid for request in requests for uuid in request["DeviceIDs"]]


async def require_absent(caller: Caller, rig: Rig, name: str) -> None:
    """Assert that the container `name` does not exist, in the engine and in the claims neither."""
    try:
        await caller.get(name)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017 - any other code fails the test
    else:
        raise AssertionError(f"{name} exists")
    assert not engine_containers_of(rig, name)
    assert name not in (await caller.holders()).values()


async def require_consistent(caller: Caller, rig: Rig, name: str, files: str | None = None) -> container_pb2.Container:
    """Assert that `name` runs in one engine container, with the GPUs and ports that it claims, and with its files.

    `files` is what SHOW_FILES has printed in the container; None leaves them out. Returns the container.
    """
    container = await caller.get(name)
    found = engine_containers_of(rig, name)
    assert len(found) == 1, [inspected["Name"] for inspected in found]
    (engine,) = found
    assert container.status.state == container_pb2.CONTAINER_STATE_RUNNING
    assert engine["State"]["Running"]
    assert engine["Id"] == container.status.engine_id
    assert gpus_of(engine) == list(container.status.gpu_uuids)
    held = [uuid for uuid, holder in (await caller.holders()).items() if holder == name]
    assert sorted(held) == sorted(container.status.gpu_uuids)
    assert len(container.status.gpu_uuids) == container.spec.gpus.count
    published = {
        int(binding["HostPort"]) for bindings in engine["HostConfig"]["PortBindings"].values() for binding in bindings
    }
    assert published == {binding.host_port for binding in container.status.ports}
    if files is not None:
        assert await caller.shell(name, SHOW_FILES) == files
    return container
