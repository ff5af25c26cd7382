"""Time limits of tests grow with the time that a container takes to start, and never shrink."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rig import patience

_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patience that the rest of the run does not share."""
    monkeypatch.setattr(patience, "_patience", patience._Patience(least=1.0))


@pytest.mark.parametrize(("seconds", "factor"), [(0.0, 1.0), (0.15, 1.0), (0.9, 3.0), (600.0, 20.0)])
def test_a_limit_is_multiplied_by_how_much_longer_a_container_takes_to_start(seconds: float, factor: float) -> None:
    patience._patience.set_by(seconds)
    assert patience.limit(10) == pytest.approx(10 * factor)
    assert patience.highest_patience() == pytest.approx(factor)


def test_a_machine_that_is_faster_again_has_shorter_limits() -> None:
    patience._patience.set_by(3.0)
    patience._patience.set_by(0.3)
    assert (patience.limit(10), patience.highest_patience()) == (10, 10)


def test_it_is_measured_again_only_when_the_last_measurement_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    patience.measure_patience(lambda: measured.append("first"))
    patience.measure_patience(lambda: measured.append("too early"))
    patience.measure_patience(lambda: measured.append("asked for"), again=True)
    later = time.monotonic() + 60
    monkeypatch.setattr("time.monotonic", lambda: later)
    patience.measure_patience(lambda: measured.append("old"))
    assert measured == ["first", "asked for", "old"]


def test_the_environment_sets_the_least_factor() -> None:
    program = "from tests.rig import patience; patience._patience.set_by(0.1); print(patience.limit(2))"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=_REPOSITORY,
        env={"GPUDOCK_RIG_PATIENCE": "10"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "20.0\n"


_SLOW_TEST = """
import time
import pytest
from tests.rig import patience


@pytest.mark.timeout({seconds})
def test_slow():
    time.sleep(1.5)


patience._patience.set_by({start})
"""


@pytest.mark.parametrize(("start", "outcome"), [(0.3, 1), (3.0, 0)])
def test_the_timeout_of_a_test_is_such_a_limit(tmp_path: Path, start: float, outcome: int) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.conftest"]\n')
    (tmp_path / "test_slow.py").write_text(_SLOW_TEST.format(seconds=1, start=start))
    words = ["-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)]
    ended = subprocess.run([sys.executable, *words], cwd=_REPOSITORY, check=False, capture_output=True, text=True)
    assert ended.returncode == outcome, ended.stdout
    assert ("Timeout" in ended.stdout) == bool(outcome)
