"""The I/O of gRPC, which is chosen by an environment variable before grpc is imported."""

from __future__ import annotations

import os
import subprocess
import sys

_SHOW = "import gpudock_server, grpc, os; print(os.environ['GRPC_EXPERIMENTS'])"


def _experiments(**environment: str) -> tuple[list[str], str]:
    """Import the daemon in a process; return its GRPC_EXPERIMENTS and what gRPC printed to stderr."""
    bare = {name: text for name, text in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", _SHOW], env=bare | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().split(","), done.stderr


def test_the_installed_grpc_knows_the_experiments() -> None:
    experiments, stderr = _experiments()
    assert experiments == ["-event_engine_client", "-event_engine_listener"]
    assert stderr == ""


def test_experiments_of_the_operator_are_kept_and_unknown_ones_are_reported() -> None:
    experiments, stderr = _experiments(GRPC_EXPERIMENTS="-event_engine_client,no_such_experiment")
    assert experiments == ["-event_engine_client", "no_such_experiment"]
    assert "Unknown experiment: no_such_experiment" in stderr
