"""What must be true of a container, its claims and the engine whatever has happened, once nothing is under way."""

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
    """Everything that the engine has, inspected."""
    listed = rig.engine.call("GET", "/containers/json?all=1")
    return [rig.engine.call("GET", f"/containers/{inspected['Id']}/json") for inspected in listed]


def layer_images(rig: Rig) -> set[str]:
    """The names of images that hold what containers wrote; those too that dead daemons of other tests have left."""
    tags = [tag for image in rig.engine.call("GET", "/images/json") for tag in image["RepoTags"] or ()]
    return {tag for tag in tags if tag.startswith("gpudock/layer")}


def bound_host_paths(rig: Rig) -> list[str]:
    """Where host paths are bound for engine containers."""
    points = [line.split()[1] for line in rig.run("cat", "/proc/self/mounts").stdout.splitlines()]
    return [point for point in points if point.startswith("/run/gpudock-host-paths/")]


def gpus_of(inspected: dict[str, Any]) -> list[str]:
    """The cards that an engine container was given."""
    requests = inspected["HostConfig"]["DeviceRequests"] or []
    return [uuid for request in requests for uuid in request["DeviceIDs"]]


async def require_absent(caller: Caller, rig: Rig, name: str) -> None:
    """`name` does not exist, and nothing of it is left."""
    try:
        await caller.get(name)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017 (any other code is the failure)
    else:
        raise AssertionError(f"{name} exists")
    assert not [
        inspected for inspected in engine_containers(rig) if inspected["Config"]["Labels"].get("gpudock.name") == name
    ]
    assert name not in (await caller.holders()).values()


async def require_consistent(caller: Caller, rig: Rig, name: str, files: str | None = None) -> container_pb2.Container:
    """`name` runs in one engine container, with the cards and ports it claims, and with its files."""
    container = await caller.get(name)
    ours = [
        inspected for inspected in engine_containers(rig) if inspected["Config"]["Labels"].get("gpudock.name") == name
    ]
    assert len(ours) == 1, [inspected["Name"] for inspected in ours]
    (engine,) = ours
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
