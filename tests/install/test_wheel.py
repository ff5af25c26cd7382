"""The wheel without extras: it needs no package of the daemon, and building it does not change the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.install.wheelhouse import BASE_PYTHON, environment
from tests.rig.patience import limit
from tests.rig.rig import REPOSITORY

pytestmark = pytest.mark.deep

_DEADLINE_S = 300.0
_CLIENT = """
import importlib.util
import gpudock
from gpudock.v1 import container_service_pb2_grpc

assert container_service_pb2_grpc.ContainerServiceStub
assert importlib.util.find_spec("aiodocker") is None
"""


def test_the_client_works_without_the_daemon(tmp_path: Path) -> None:
    stub = REPOSITORY / "client/gpudock/v1/container_service_pb2.py"
    before = stub.stat()
    tools, client = tmp_path / "tools", tmp_path / "client"
    _run(BASE_PYTHON, "-m", "venv", tools)
    _run("scripts/build-wheel", tmp_path, tools)
    assert stub.stat() == before
    [wheel] = tmp_path.glob("gpudock-*.whl")
    _run(BASE_PYTHON, "-m", "venv", "--without-pip", client)
    _run(tools / "bin/python", "-m", "pip", "--python", client / "bin/python", "install", wheel)
    _run(client / "bin/gpudock", "--help")
    _run(client / "bin/python", "-c", _CLIENT)


def _run(*words: str | Path) -> None:
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env=environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=limit(_DEADLINE_S),
    )
    assert done.returncode == 0, done.stdout + done.stderr
