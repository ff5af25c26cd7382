"""Pytest fixtures, for `pytest_plugins = ["tests.rig.fixtures"]`.

The rig is started and stopped without an event loop, so tests may use loops of any scope. Fixtures with connections
are made for each test, in its event loop.
"""

import os
import shlex
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from aiodocker import Docker

from .engine_proxy import EngineProxy
from .gpus import FakeGpus
from .images import BUSYBOX, CUDA_LIKE, GLIBC
from .rig import Rig

IMAGES_VARIABLE = "GPUDOCK_RIG_IMAGES"
"""An environment variable: the images of the session's rig, separated by spaces; all test images if unset."""

ENGINE_OPTIONS_VARIABLE = "GPUDOCK_RIG_ENGINE_OPTIONS"
"""An environment variable: further flags of the dockerd of the session's rig."""

_LOG_TAIL = 4000


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """The session's rig: engine, etcd, 8 GPUs, test images."""
    images = os.environ.get(IMAGES_VARIABLE, "").split() or (BUSYBOX, CUDA_LIKE, GLIBC)
    options = shlex.split(os.environ.get(ENGINE_OPTIONS_VARIABLE, ""))
    with Rig(images=images, engine_options=options, forks=True) as started:
        yield started


@pytest.fixture(autouse=True)
def engine_runs(request: pytest.FixtureRequest) -> None:
    """Start the session's engine if an earlier test left it dead, and report that as one problem of the run."""
    if "rig" not in request.fixturenames:
        return
    rig: Rig = request.getfixturevalue("rig")
    if not rig.engine.process.running:
        problems: list[str] = request.getfixturevalue("run_problems")
        problems.append(f"the engine was dead before {request.node.nodeid}:\n{rig.engine.log_text[-_LOG_TAIL:]}")
        rig.engine.start()
    rig.measure_patience()


@pytest.fixture(scope="module")
def fragile_rig() -> Iterator[Rig]:
    """A rig for one module, whose tests may kill the engine and etcd."""
    with Rig(images=(BUSYBOX,), forks=True) as started:
        yield started


@pytest.fixture
def gpus(rig: Rig) -> Iterator[FakeGpus]:
    """The eight GPUs of the rig; the test may change them, and they are reset after it."""
    yield rig.gpus
    rig.gpus.reset()


@pytest.fixture
def clean_engine(rig: Rig) -> Iterator[Rig]:
    """The rig; all containers and volumes of its engine are removed after the test."""
    yield rig
    rig.engine.remove_all()


@pytest_asyncio.fixture
async def docker(clean_engine: Rig) -> AsyncIterator[Docker]:
    """An aiodocker client of the engine; containers and volumes are removed after the test."""
    async with Docker(url=clean_engine.engine.url) as client:
        yield client


@pytest_asyncio.fixture
async def engine_proxy(clean_engine: Rig) -> AsyncIterator[EngineProxy]:
    """A fault-injecting proxy in front of the engine, in the test's event loop."""
    async with clean_engine.engine_proxy() as proxy:
        yield proxy
