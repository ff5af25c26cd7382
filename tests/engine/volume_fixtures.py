"""Pytest fixtures and helpers for volume backends: a folder for backings, the engine, and the loop backend."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.volumes import LoopBackend, ProjectQuotaBackend
from gpudock_server.adapters.volumes.filesystems import FILESYSTEMS
from gpudock_server.model.engine import LABEL_UID
from gpudock_server.model.volume import VolumeBacking

from tests.engine.loop_devices import loop_devices_below
from tests.rig import Rig
from tests.selection import deep_except

MIB = 1 << 20
VOLUME_SIZE = 320 * MIB
"""Above the minimum size of every filesystem."""


@pytest.fixture
def root(rig: Rig) -> Iterator[Path]:
    """A folder for backings, not created yet; fails a test that leaves a loop device attached below it."""
    folder = rig.folder / f"volumes-{uuid.uuid4()}"
    yield folder
    assert attached_images(folder) == [], "the test left loop devices"


@pytest_asyncio.fixture
async def engine(clean_engine: Rig) -> AsyncIterator[DockerEngine]:
    engine = await DockerEngine.connect(clean_engine.engine.url)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(params=deep_except(["xfs"], [filesystem.name for filesystem in FILESYSTEMS]))
async def loop(request: pytest.FixtureRequest, root: Path) -> LoopBackend:
    """The loop backend with each filesystem that this host has."""
    backend = LoopBackend(root, local=True, filesystem=request.param)
    if reason := await backend.unavailable_reason():
        pytest.skip(reason)
    return backend


def attached_images(folder: Path) -> list[str]:
    """The images below a folder that have a loop device, sorted; an image with two devices is listed twice."""
    return sorted(loop_devices_below(folder).values())


def new_uid() -> str:
    """A uid for a backing."""
    return str(uuid.uuid4())


def mount(volume: str, target: str = "/data", *, read_only: bool = False) -> container_pb2.Mount:
    """A mount of a volume of gpudock."""
    return container_pb2.Mount(volume=volume, target=target, read_only=read_only)


async def create_engine_volume(engine: DockerEngine, backing: VolumeBacking) -> str:
    """Create the engine volume of a backing; returns its name."""
    await engine.create_volume(
        backing.engine_volume, labels={LABEL_UID: backing.uid}, driver_options=backing.driver_options
    )
    return backing.engine_volume


async def remove_volume(
    engine: DockerEngine, backend: LoopBackend | ProjectQuotaBackend, backing: VolumeBacking
) -> None:
    """Remove the engine volume of a backing, and destroy the backing."""
    await engine.remove_volume(backing.engine_volume)
    await backend.destroy(backing)
