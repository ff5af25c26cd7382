"""Fixtures for each implementation of ports.Engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from gpudock_server.adapters.docker import DockerEngine

from tests.calls import IMAGE
from tests.contracts.engine_subject import EngineSubject
from tests.rig import CUDA_LIKE, Rig
from tests.rpc import fakes
from tests.unit import model_engine
from tests.unit.faults import Faults
from tests.unit.model_engine import ModelEngine


@pytest.fixture
async def docker_engine_subject(clean_engine: Rig) -> AsyncIterator[EngineSubject]:
    """The Docker adapter, on the rig's engine."""
    engine = await DockerEngine.connect(clean_engine.engine.url, timeout=60)
    try:
        yield EngineSubject(engine, IMAGE, CUDA_LIKE, "/data", patience=60)
    finally:
        await engine.close()


@pytest.fixture
def model_engine_subject() -> EngineSubject:
    """The fake of saga tests, which has files."""
    return EngineSubject(ModelEngine(Faults()), model_engine.OTHER_IMAGE, model_engine.IMAGE, "/cache")


@pytest.fixture
def fake_engine_subject() -> EngineSubject:
    """The fake of RPC tests, which has states."""
    return EngineSubject(fakes.FakeEngine(), fakes.IMAGE, fakes.IMAGE, "/data")


@pytest.fixture(params=["fake", "model", "docker"])
def any_engine(request: pytest.FixtureRequest) -> EngineSubject:
    """Each implementation in turn."""
    made: EngineSubject = request.getfixturevalue(f"{request.param}_engine_subject")
    return made
