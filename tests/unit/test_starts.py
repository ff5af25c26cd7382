"""Engine containers are created, started and removed in one module, which binds and releases their host paths."""

from __future__ import annotations

import re
from pathlib import Path

import gpudock_server.core

_DIRECT_CALL = re.compile(r"\bengine\.(create|start|remove)\(")


def test_core_goes_through_engine_containers() -> None:
    core = Path(gpudock_server.core.__file__).parent
    modules = {path.name for path in core.rglob("*.py") if _DIRECT_CALL.search(path.read_text(encoding="utf-8"))}
    assert modules == {"engine_containers.py"}
