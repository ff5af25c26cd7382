"""The wheel for a client: it brings nothing that is the daemon's; building it changes nothing in the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.install.wheelhouse import BASE_PYTHON, environment
from tests.rig.rig import REPOSITORY

_DEADLINE_S = 300.0
_CLIENT = """
import importlib.util
import gpudock
from gpudock.v1 import container_service_pb2_grpc
assert container_service_pb2_grpc.ContainerServiceStub
assert importlib.util.find_spec("aiodocker") is None
"""


def test_a_client_alone(tmp_path: Path) -> None:
    stub = REPOSITORY / "client/gpudock/v1/container_service_pb2.py"
    before = stub.stat()
    _run("scripts/build-wheel", tmp_path)
    assert stub.stat() == before
    [wheel] = tmp_path.glob("gpudock-*.whl")
    _run(BASE_PYTHON, "-m", "venv", tmp_path / "venv")
    _run(tmp_path / "venv/bin/pip", "install", "--quiet", wheel)
    _run(tmp_path / "venv/bin/gpudock", "--help")
    _run(tmp_path / "venv/bin/python", "-c", _CLIENT)


def _run(*words: str | Path) -> None:
    done = subprocess.run(
        words, cwd=REPOSITORY, env=environment(), check=False, capture_output=True, text=True, timeout=_DEADLINE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
