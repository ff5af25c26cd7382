"""The report of a run: a problem outside of tests fails the run, with and without workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract import KINDS, NOT_PROVOKED, REASONS, RPCS, Coverage
from tests.rig.patience import limit

_REPOSITORY = Path(__file__).parents[2]
_WORKERS = pytest.mark.parametrize("workers", [(), ("--numprocesses", "2")], ids=["alone", "workers"])


def _run(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "tests.run_report", "-c", "/dev/null", "--rootdir", str(folder)]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *words, str(folder / "test_it.py")],
        cwd=_REPOSITORY, check=False, capture_output=True, text=True, timeout=limit(120),
    )  # fmt: skip


@_WORKERS
def test_a_problem_fails_a_run_whose_tests_all_pass(tmp_path: Path, workers: tuple[str, ...]) -> None:
    ended = _run(
        tmp_path,
        "import pytest\n"
        "@pytest.fixture(scope='session')\n"
        "def daemon(run_problems):\n"
        "    yield\n"
        "    run_problems.append('the daemon ended with 3')\n"
        "def test_one(daemon): pass\n"
        "def test_two(): pass\n",
        *workers,
    )
    assert "2 passed" in ended.stdout
    assert "the daemon ended with 3" in ended.stdout
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED


@pytest.mark.deep
@_WORKERS
def test_a_run_without_problems_passes_and_shows_the_outcomes_of_calls(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    ended = _run(
        tmp_path,
        "import pytest\n"
        "@pytest.mark.parametrize('call', ['Get'])\n"
        "def test_one(request, run_problems, call):\n"
        "    request.node.user_properties.append(('outcomes', {'NOT_FOUND': 1, 'OK': 2}))\n",
        *workers,
    )
    assert ended.returncode == pytest.ExitCode.OK, ended.stdout
    assert "OK 2, NOT_FOUND 1" in ended.stdout
    assert "problem of the run" not in ended.stdout


@pytest.mark.deep
@_WORKERS
@pytest.mark.parametrize(
    ("counts", "code"), [("{'kill': part, 'drop': 1 - part}", 0), ("{'kill': part, 'drop': 0}", 1)]
)
def test_a_required_event_must_occur_in_one_of_the_parts(
    tmp_path: Path, workers: tuple[str, ...], counts: str, code: int
) -> None:
    ended = _run(
        tmp_path,
        "import pytest\n"
        "@pytest.mark.parametrize('part', [0, 1])\n"
        "def test_one(request, part):\n"
        f"    value = {{'parts': 2, 'counts': {counts}}}\n"
        "    request.node.user_properties.append(('required', value))\n",
        *workers,
    )
    assert ended.returncode == code, ended.stdout
    assert ("'drop' has not occurred" in ended.stdout) == bool(code)


@pytest.mark.deep
@_WORKERS
def test_the_moments_at_which_daemons_were_killed_are_counted_and_listed(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    ended = _run(
        tmp_path,
        "import pytest\n"
        "@pytest.mark.parametrize('saga', ['pause', 'broken'])\n"
        "def test_it(request, saga):\n"
        "    report = {'seed': 'abc'}\n"
        "    request.node.user_properties.append(('moments', report))\n"
        "    if saga == 'pause':\n"
        "        report.update(kind='PAUSE', known=['one', 'two'], tried=['two'], least=1, seconds=1.5)\n",
        *workers,
        "--moments",
        str(tmp_path / "moments.txt"),
    )
    assert ended.returncode == pytest.ExitCode.OK, ended.stdout
    assert "(seeds: abc)" in ended.stdout
    assert "1 of 2 moments, 1.5 s" in ended.stdout
    first, *listed = (tmp_path / "moments.txt").read_text().splitlines()
    assert first.startswith("PAUSE")
    assert "test_it[pause]" in first
    assert listed == ["           one", "    tried  two"]


def test_missing_coverage_of_the_contract_is_named() -> None:
    coverage = Coverage(set(RPCS), set(REASONS - NOT_PROVOKED.keys()), set(KINDS))
    assert coverage.missing() == []
    coverage.rpcs.remove("NodeService/ListPorts")
    coverage.reasons.remove("GPU_EXHAUSTED")
    coverage.kinds.remove("ROLLBACK")
    assert [sentence.split()[-1] for sentence in coverage.missing()] == ["daemon", "GPU_EXHAUSTED", "ROLLBACK"]
    other = Coverage()
    other.merge(Coverage({"NodeService/ListPorts"}, {"GPU_EXHAUSTED"}, {"ROLLBACK"}).to_lists())
    coverage.merge(other.to_lists())
    assert coverage.missing() == []


# The tests of a run that covers the whole contract except LEFT_OUT.
_COVERING_TESTS = """
import pytest
from tests import contract
from tests.contract import COVERAGE

@pytest.mark.parametrize("half", [0, 1])
def test_it(request, half):
    COVERAGE.rpcs.update(sorted(contract.RPCS - LEFT_OUT)[half::2])
    COVERAGE.reasons.update(sorted(contract.REASONS - contract.NOT_PROVOKED.keys() - LEFT_OUT)[half::2])
    COVERAGE.reasons.update(ALSO)

@pytest.mark.parametrize("kind", sorted(contract.KINDS - LEFT_OUT))
def test_kill(request, kind):
    report = dict(seed="abc", kind=kind, known=["one"], tried=["one"], least=1, seconds=1)
    request.node.user_properties.append(("moments", report))

@pytest.mark.deep
def test_deep(): pass
"""


def _run_covering_tests(
    folder: Path, *words: str, left_out: str = "", also: str = "", selected: str = "not deep"
) -> subprocess.CompletedProcess[str]:
    """Run the covering tests as `make test` does, from the configured test path."""
    (folder / "test_it.py").write_text(f"LEFT_OUT, ALSO = {{{left_out!r}}}, set({also.split()}){_COVERING_TESTS}")
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = test_it.py\nmarkers = deep: of make test-deep\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.run_report", "-p", "no:cacheprovider", "-m", selected]
    return subprocess.run(
        [*command, "-p", "no:hypothesispytest", *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(_REPOSITORY)},
        check=False, capture_output=True, text=True, timeout=limit(120),
    )  # fmt: skip


@pytest.mark.deep
@_WORKERS
def test_a_run_that_covers_the_contract_passes(tmp_path: Path, workers: tuple[str, ...]) -> None:
    ended = _run_covering_tests(tmp_path, *workers)
    assert ended.returncode == pytest.ExitCode.OK, ended.stdout + ended.stderr
    assert "kinds of operations were killed" in ended.stdout
    assert "problem of the run" not in ended.stdout


@pytest.mark.deep
@pytest.mark.parametrize(
    ("left_out", "problem"),
    [
        ("NodeService/ListPorts", "no test has received a response of NodeService/ListPorts from a daemon"),
        ("GPU_EXHAUSTED", "no test has received an error with the reason GPU_EXHAUSTED"),
        ("ROLLBACK", "no test has killed a daemon during an operation of kind ROLLBACK"),
    ],
)
def test_a_run_that_misses_a_part_of_the_contract_fails(tmp_path: Path, left_out: str, problem: str) -> None:
    ended = _run_covering_tests(tmp_path, "--numprocesses", "2", left_out=left_out)
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout + ended.stderr
    assert ended.stdout.count("problem of the run") == 1
    assert problem in ended.stdout


@pytest.mark.deep
def test_an_unneeded_exemption_fails_the_run(tmp_path: Path) -> None:
    ended = _run_covering_tests(tmp_path, also="PERMISSION_DENIED")
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED
    assert "a test has received the reason PERMISSION_DENIED: remove it from NOT_PROVOKED" in ended.stdout


@pytest.mark.deep
@pytest.mark.parametrize(
    ("words", "selected"),
    [((), "deep"), ((), ""), (("-k", "half or kill or it"), "not deep"), (("test_it.py",), "not deep")],
)
def test_a_run_of_some_tests_need_not_cover_the_contract(tmp_path: Path, words: tuple[str, ...], selected: str) -> None:
    ended = _run_covering_tests(tmp_path, *words, left_out="ROLLBACK", selected=selected)
    assert ended.returncode == pytest.ExitCode.OK, ended.stdout + ended.stderr
    assert "of the contract" not in ended.stdout


def test_make_test_and_make_test_deep_run_each_test_once() -> None:
    makefile = (_REPOSITORY / "Makefile").read_text(encoding="utf-8")
    recipes = {
        target: next(line for line in makefile.partition(f"\n{target}: ")[2].splitlines() if line.startswith("\t"))
        for target in ("test", "test-deep")
    }
    assert recipes == {
        "test": '\t$(PYTEST) -m "not deep" $(PYTEST_ARGS)',
        "test-deep": "\t$(PYTEST) -m deep $(PYTEST_ARGS)",
    }
