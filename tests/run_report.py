"""A pytest plugin for what belongs to a run and not to one of its tests.

Problems: what the end of a daemon that many tests shared shows (its exit code, a traceback in its log) is no failure of
whichever test happened to be the last. The fixture `run_problems` takes such problems; any one fails the run.

Outcomes: a test's property `OUTCOMES` says how often its calls ended in which status. The summary has them as a table.

Both work with pytest-xdist, whose workers pass problems on when they end.
"""

from __future__ import annotations

from typing import Any

import pytest

OUTCOMES = "outcomes"

_PROBLEMS = pytest.StashKey[list[str]]()
_OUTPUT_KEY = "gpudock_run_problems"


def pytest_configure(config: pytest.Config) -> None:
    """Begin without problems."""
    config.stash[_PROBLEMS] = []


@pytest.fixture(scope="session")
def run_problems(pytestconfig: pytest.Config) -> list[str]:
    """The problems of the run so far; append to it."""
    return pytestconfig.stash[_PROBLEMS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's problems to the controller, or fail the run for them."""
    problems = session.config.stash[_PROBLEMS]
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_OUTPUT_KEY] = problems
    elif problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the problems of a worker of pytest-xdist that has ended."""
    node.config.stash[_PROBLEMS].extend(getattr(node, "workeroutput", {}).get(_OUTPUT_KEY, ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the table of outcomes, and the problems last."""
    rows = {
        report.nodeid.rpartition("[")[2].rstrip("]"): value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == OUTCOMES
    }
    if rows:
        terminalreporter.section("how calls ended")
    for row, counts in sorted(rows.items()):
        words = (f"{status} {count}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
        terminalreporter.line(f"{row:26} {', '.join(words)}")
    for problem in terminalreporter.config.stash[_PROBLEMS]:
        terminalreporter.section("problem of the run", red=True)
        terminalreporter.line(problem)
