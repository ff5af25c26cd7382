"""How gRPC is told to do its I/O, which it hears only before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys

_SHOW = "import gpudock_server, grpc, os; print(os.environ['GRPC_EXPERIMENTS'])"


def _experiments(**environment: str) -> tuple[list[str], str]:
    """What a process that imports the daemon has asked gRPC for, and what gRPC said about it."""
    bare = {name: text for name, text in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", _SHOW], env=bare | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().split(","), done.stderr


def test_the_installed_grpc_still_has_its_older_way() -> None:
    asked, said = _experiments()
    assert asked == ["-event_engine_client", "-event_engine_listener"]
    assert said == ""


def test_what_an_operator_asks_for_stands_and_a_mistake_in_it_is_told() -> None:
    asked, said = _experiments(GRPC_EXPERIMENTS="-event_engine_client,no_such_experiment")
    assert asked == ["-event_engine_client", "no_such_experiment"]
    assert "Unknown experiment: no_such_experiment" in said
