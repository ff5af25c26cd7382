"""Engine containers are created, started and removed in one place, which sees to their host paths."""

from __future__ import annotations

import re
from pathlib import Path

import gpudock_server.core

_AROUND = re.compile(r"\bengine\.(create|start|remove)\(")


def test_core_goes_through_engine_containers() -> None:
    core = Path(gpudock_server.core.__file__).parent
    around = {path.name for path in core.rglob("*.py") if _AROUND.search(path.read_text(encoding="utf-8"))}
    assert around == {"engine_containers.py"}
