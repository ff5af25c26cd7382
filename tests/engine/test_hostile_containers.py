"""A hostile layer in a running container: each call that transfers its files succeeds, or is refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from gpudock.v1 import container_pb2, container_service_pb2

from tests.calls import Caller, failure, progress_of
from tests.engine.drift import docker_inspect
from tests.engine.hostile_trees import HOSTILE_SHAPES, fingerprint
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.rig import CUDA_LIKE

__all__ = ["daemons"]

pytestmark = pytest.mark.deep

# The engine writes holes as zeros, here 3 TiB, and leaves out files whose paths are too long.
_REFUSED_COMMITS = {"sparse": "DISK_FULL", "deep": "LAYER_CARRY_FAILED", "long names": "LAYER_CARRY_FAILED"}


def _inside(daemons: IsolatedDaemons, container: container_pb2.Container, path: str) -> Path:
    """The path on the host of a path inside a running container."""
    return Path("/proc", str(docker_inspect(daemons.rig, container.status.engine_id)["State"]["Pid"]), "root", path)


@pytest.mark.parametrize("shape", ["deep", "long names", "many links", "sparse", "odd files"])
async def test_a_layer_with_any_content_moves_complete_or_is_refused(daemons: IsolatedDaemons, shape: str) -> None:
    daemon = await daemons.start("--settle-period", "0")
    async with Caller(daemon.target) as caller:
        first = await caller.create("hostile", 1)
        await caller.create("neighbour", 1)
        await caller.shell("hostile", "mkdir /zoo")
        zoo = os.open(_inside(daemons, first, "zoo"), os.O_RDONLY | os.O_DIRECTORY)
        HOSTILE_SHAPES[shape](zoo)
        os.close(zoo)
        planted = fingerprint(str(_inside(daemons, first, "zoo")))

        scaled = await caller.scale("hostile", 2)
        assert fingerprint(str(_inside(daemons, scaled, "zoo"))) == planted
        cloned = await caller.clone("hostile", "clone")
        assert fingerprint(str(_inside(daemons, cloned, "zoo"))) == planted
        await caller.delete("clone")
        await caller.shell("hostile", "mv /zoo /moved")
        back = await caller.rollback("hostile", 1)
        assert fingerprint(str(_inside(daemons, back, "zoo"))) == planted

        request = container_service_pb2.CommitContainerRequest(name="hostile", repository=f"zoo/{daemons.id}", tag="v1")
        if shape in _REFUSED_COMMITS:
            # An update to another image transfers the files by commit too.
            other: dict[str, Any] = {"image": CUDA_LIKE, "files": container_service_pb2.FILES_POLICY_CARRY_COMMIT}
            for validate_only in (True, False):
                moved = await failure(caller.update("hostile", validate_only=validate_only, **other))
                assert moved.reason == _REFUSED_COMMITS[shape], moved
            assert (await caller.get("hostile")).revision == back.revision
        commit = progress_of(caller.containers.CommitContainer(request))
        if shape in _REFUSED_COMMITS:
            assert (await failure(commit)).reason == _REFUSED_COMMITS[shape]
        else:
            await commit
        assert (await caller.get("hostile")).status.state == container_pb2.CONTAINER_STATE_RUNNING
        assert fingerprint(str(_inside(daemons, await caller.get("hostile"), "zoo"))) == planted
        tags = [tag for image in daemons.rig.engine.call("GET", "/images/json") for tag in image["RepoTags"] or ()]
        assert (f"zoo/{daemons.id}:v1" in tags) == (shape not in _REFUSED_COMMITS)
        assert not [tag for tag in tags if tag.startswith(("gpudock/raw:", "gpudock/commit:"))]

        assert await caller.shell("neighbour", "echo well") == "well\n"
        for name in ("hostile", "neighbour"):
            await caller.delete(name)
    assert "Traceback" not in daemon.log_text, daemon.log_text
