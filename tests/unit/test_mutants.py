"""`make mutants`: decorated functions, results and explanations."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mutants import report
from tests.mutants.__main__ import ROOT
from tests.mutants.decorators import without_decorators
from tests.mutants.report import Outcome, forget, read_mutants, write_report
from tests.rig.patience import limit

pytestmark = pytest.mark.deep

CODE = """
class A:
    @property
    @override
    def size(self) -> int:
        return 1

    @override
    async def look(self) -> int:
        return 2

    @staticmethod
    @override
    def none() -> int:
        return 3

    @cache
    def kept(self) -> int:
        return 4
"""

MUTATED = """def x_f__mutmut_orig(a):
    return a + 1

def x_f__mutmut_1(a):
    return a - 1

def x_f__mutmut_2(a):
    return a + 2
"""


def test_decorated_functions_behave_as_before_and_can_be_mutated() -> None:
    code = without_decorators(CODE)
    assert "override" not in code
    assert "@property" not in code
    names: dict[str, Any] = {"cache": lambda function: function}
    exec(code, names)  # noqa: S102 - code of this test
    instance = names["A"]()
    assert (instance.size, instance.none(), instance.kept()) == (1, 3, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which one mutant was caught and one survived."""
    (tmp_path / "mutants").mkdir()
    (tmp_path / "mutants" / "m.py").write_text(MUTATED)
    codes = {"m.x_f__mutmut_1": 1, "m.x_f__mutmut_2": 0}
    (tmp_path / "mutants" / "m.py.meta").write_text(json.dumps({"exit_code_by_key": codes}))
    spans = {"x_f__mutmut_orig": [1, 2], "x_f__mutmut_1": [4, 5], "x_f__mutmut_2": [7, 8]}
    (tmp_path / "mutants" / "m.py.spans").write_text(json.dumps({"spans": spans}))
    return tmp_path


def explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: str) -> None:
    file = tmp_path / "explained.toml"
    file.write_text(
        f"[[explained]]\ngroup = 'r'\nfunction = 'm:f'\nremoved = 'return a + 1'\nadded = '{added}'\nreason = 'so'\n"
    )
    monkeypatch.setattr(report, "_EXPLAINED", file)


def test_surviving_mutants_are_shown_and_counted(folder: Path) -> None:
    mutants = read_mutants(folder)
    assert [mutant.outcome for mutant in mutants] == [Outcome.CAUGHT, Outcome.SURVIVED]
    text, problems = write_report("r", mutants, mutants, 85)
    assert "1 caught, 0 timed out, 1 survived" in text
    assert "+    return a + 2" in text
    assert "-    return a - 1" not in text
    assert problems == ["r: 50.0 % caught; at least 85 % of the mutants must be caught"]


def test_a_report_without_tried_mutants_is_a_problem(folder: Path) -> None:
    forget(folder, {"m.x_f__mutmut_1", "m.x_f__mutmut_2"})
    mutants = read_mutants(folder)
    text, problems = write_report("r", mutants, mutants, 85)
    assert text.splitlines()[0].endswith("; nothing tried")
    assert problems == ["r: nothing tried; at least 85 % of the mutants must be caught"]
    assert not write_report("r", mutants, mutants, 0)[1]


def test_a_forgotten_mutant_has_no_result(folder: Path) -> None:
    forget(folder, {"m.x_f__mutmut_2"})
    assert [mutant.outcome for mutant in read_mutants(folder)] == [Outcome.CAUGHT, Outcome.OPEN]


def test_an_explained_survivor_is_not_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explain(folder, monkeypatch, "return a + 2")
    mutants = read_mutants(folder)
    text, problems = write_report("r", mutants, mutants, 85)
    assert "explained: so" in text
    assert not problems


def test_an_explanation_without_a_mutant_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explain(folder, monkeypatch, "return a + 3")
    mutants = read_mutants(folder)
    _, problems = write_report("r", mutants, mutants, 0)
    assert len(problems) == 1
    assert "does not exist" in problems[0]


# A mutant of `countdown` counts upwards. For each mutant, the test starts a process in its own session and records its
# id.
PROJECT = {
    "pyproject.toml": """
[tool.mutmut]
source_paths = ["src"]
only_mutate = ["src/counting/down.py"]
pytest_add_cli_args_test_selection = ["tests/test_down.py"]
pytest_add_cli_args = ["-p", "no:cacheprovider"]
process_isolation = "forkserver"
timeout_constant = 6.0
timeout_multiplier = 1.0
use_git_change_detection = false
""",
    "src/counting/__init__.py": "",
    "src/counting/down.py": """
def countdown(number):
    while number > 0:
        number -= 1
    return number
""",
    "tests/__init__.py": "",
    "tests/test_down.py": """
import os
import subprocess
from pathlib import Path
from counting.down import countdown

FOLDER = Path(__file__).resolve().parents[2]

def test_countdown():
    if "__mutmut_" in os.environ.get("MUTANT_UNDER_TEST", ""):
        left = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        with (FOLDER / "left").open("a") as file:
            print(left.pid, file=file)
    assert countdown(2) == 0
""",
}
PROGRAM = """
import sys
from pathlib import Path
from tests.mutants.__main__ import Interrupted, run
try:
    run(Path(sys.argv[1]), *sys.argv[2:])
except Interrupted:
    sys.exit(130)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with generated mutants, of which one that is caught and one that hangs are to be tried."""
    for name, content in PROJECT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with run(tmp_path, "generate") as generating:
        assert generating.wait() == 0, (tmp_path / "mutmut.log").read_text()
    tried = [mutant.name for mutant in read_mutants(tmp_path) if mutant.added in ("while number > 1:", "number += 1")]
    assert len(tried) == 2
    (tmp_path / "todo.txt").write_text("\n".join(tried))
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run mutmut in `folder` as `make mutants` does."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def still_running(folder: Path) -> list[str]:
    """Return the ids of processes that the tests of mutants started and that still run."""
    left = (folder / "left").read_text().split()
    assert left
    names = {pid: Path(f"/proc/{pid}/comm") for pid in left}
    return [pid for pid, name in names.items() if name.exists() and name.read_text().strip() == "sleep"]


def test_a_mutant_that_hangs_is_killed_with_its_processes_and_counts_as_timed_out(project: Path) -> None:
    with run(project, "run", "todo.txt") as running:
        assert running.wait() == 0, (project / "mutmut.log").read_text()
    outcomes = {mutant.added: mutant.outcome for mutant in read_mutants(project)}
    assert outcomes["number += 1"] is Outcome.TIMED_OUT
    assert outcomes["while number > 1:"] is Outcome.CAUGHT
    assert not still_running(project)


def any_caught(folder: Path) -> bool:
    """Return whether a mutant is recorded as caught; False while the record is being written."""
    try:
        return Outcome.CAUGHT in {mutant.outcome for mutant in read_mutants(folder)}
    except json.JSONDecodeError:
        return False


def test_an_interrupted_run_keeps_its_results_and_leaves_no_process(project: Path) -> None:
    with run(project, "run", "todo.txt") as interrupted:
        deadline = time.monotonic() + limit(200)
        while not any_caught(project):
            assert time.monotonic() < deadline, (project / "mutmut.log").read_text()
            assert interrupted.poll() is None, (project / "mutmut.log").read_text()
            time.sleep(0.05)
        interrupted.send_signal(signal.SIGINT)
        _, errors = interrupted.communicate(timeout=limit(60))
    assert interrupted.returncode == 130
    assert not errors
    outcomes = {mutant.outcome for mutant in read_mutants(project)}
    assert outcomes >= {Outcome.CAUGHT, Outcome.OPEN}
    assert not still_running(project)
