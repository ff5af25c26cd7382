"""The run's own report: a problem that no test has fails the run, with and without workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
_WORKERS = pytest.mark.parametrize("workers", [(), ("--numprocesses", "2")], ids=["alone", "workers"])


def _run(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "tests.run_report", "-c", "/dev/null", "--rootdir", str(folder)]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *words, str(folder / "test_it.py")],
        cwd=_REPOSITORY, check=False, capture_output=True, text=True, timeout=120,
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


@_WORKERS
def test_a_run_without_problems_passes_and_shows_how_calls_ended(tmp_path: Path, workers: tuple[str, ...]) -> None:
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


@_WORKERS
@pytest.mark.parametrize(
    ("counts", "code"), [("{'kill': part, 'drop': 1 - part}", 0), ("{'kill': part, 'drop': 0}", 1)]
)
def test_what_is_required_must_occur_in_some_part(
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
    assert ("'drop' has not occurred once" in ended.stdout) == bool(code)


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
