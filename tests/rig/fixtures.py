"""Pytest fixtures, for `pytest_plugins = ["tests.rig.fixtures"]`.

The rig is started and stopped without an event loop, so tests may use loops of any scope; whatever holds a connection
is made per test, in the test's own loop.
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
"""Names the images that the session's rig has, if not all."""

ENGINE_OPTIONS_VARIABLE = "GPUDOCK_RIG_ENGINE_OPTIONS"
"""Further words for its dockerd's command line."""

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
    """A test that leaves the session's engine dead fails the run, once, and not hundreds of tests after it."""
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
    """A rig of the module's own, whose engine and etcd it may kill."""
    with Rig(images=(BUSYBOX,), forks=True) as started:
        yield started


@pytest.fixture
def gpus(rig: Rig) -> Iterator[FakeGpus]:
    """The rig's GPUs: eight, idle and healthy again after the test."""
    yield rig.gpus
    rig.gpus.reset()


@pytest.fixture
def clean_engine(rig: Rig) -> Iterator[Rig]:
    """The rig, all of its containers and volumes removed after the test."""
    yield rig
    rig.engine.remove_all()


@pytest_asyncio.fixture
async def docker(clean_engine: Rig) -> AsyncIterator[Docker]:
    """An aiodocker client of the engine; what the test makes in it is removed afterwards."""
    async with Docker(url=clean_engine.engine.url) as client:
        yield client


@pytest_asyncio.fixture
async def engine_proxy(clean_engine: Rig) -> AsyncIterator[EngineProxy]:
    """A fault-injecting proxy in front of the engine, in the test's event loop."""
    async with clean_engine.engine_proxy() as proxy:
        yield proxy
