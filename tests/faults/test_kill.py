"""`kill -9` of the daemon at moments of operations on containers; the next daemon completes or undoes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpudock_server.adapters.host.trees.jobs import Jobs
from gpudock_server.model.operation import OperationKind

from tests.faults.container_scenarios import SCENARIOS
from tests.faults.daemon_killer import DaemonKiller
from tests.faults.instrumented_daemon import CALLS, JOBS
from tests.rig import Rig

# The scenario of the everyday tests for each kind of operation.
_ONE_OF_EACH_KIND = (
    "create", "scale-exchange", "rollback", "clone-copy", "update-env", "stop", "start", "restart", "pause", "unpause",
    "delete", "delete-revision", "commit",
)  # fmt: skip


@pytest.mark.parametrize("scenario", _ONE_OF_EACH_KIND)
async def test_one_moment(daemon_killer: DaemonKiller, clean_engine: Rig, tmp_path: Path, scenario: str) -> None:
    await daemon_killer.kill_at_one_moment(SCENARIOS[scenario](clean_engine, tmp_path))


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_every_moment(daemon_killer: DaemonKiller, clean_engine: Rig, tmp_path: Path, scenario: str) -> None:
    await daemon_killer.kill_at_every_moment(SCENARIOS[scenario](clean_engine, tmp_path))


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_while_undoing(daemon_killer: DaemonKiller, clean_engine: Rig, tmp_path: Path, scenario: str) -> None:
    await daemon_killer.kill_while_undoing(SCENARIOS[scenario](clean_engine, tmp_path))


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_while_recovering(daemon_killer: DaemonKiller, clean_engine: Rig, tmp_path: Path, scenario: str) -> None:
    await daemon_killer.kill_while_recovering(SCENARIOS[scenario](clean_engine, tmp_path))


def test_every_kind_of_operation_on_containers_is_killed(rig: Rig, tmp_path: Path) -> None:
    kinds = {kind.value for kind in OperationKind if not kind.value.endswith("_VOLUME")}
    assert {make(rig, tmp_path).kind for make in SCENARIOS.values()} == kinds
    assert sorted(SCENARIOS[scenario](rig, tmp_path).kind for scenario in _ONE_OF_EACH_KIND) == sorted(kinds)


@pytest.mark.parametrize("port", CALLS, ids=lambda port: port.__name__)
def test_every_call_of_a_port_is_listed_as_changing_or_not(port: type) -> None:
    changing, read_only = CALLS[port]
    declared = {name for name in vars(port) if not name.startswith("_")}
    assert declared == changing | read_only
    assert not changing & read_only


def test_every_job_of_the_tree_worker_is_listed_as_changing_or_not() -> None:
    changing, read_only = JOBS
    declared = {name for name, job in vars(Jobs).items() if callable(job) and not name.startswith("_")}
    assert declared - {"run"} == changing | read_only
    assert not changing & read_only
