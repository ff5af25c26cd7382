"""A pytest plugin with checks and reports of a whole run.

Problems: a wrong exit code of a daemon that many tests share, or a traceback in its log, is not a failure of the test
that happened to run last. The fixture `run_problems` takes such problems; each fails the run.

Outcomes: the property `OUTCOMES` of a test counts the statuses with which its calls ended. The summary has them as a
table.

Moments: the property `MOMENTS` of a test has the moments of an operation at which it has killed a daemon. The summary
counts them; `--moments FILE` writes all of them to a file.

Requirements: the property `REQUIRED` of a test that is one of several `parts` has `counts` of events that must occur.
An event that occurs in none of the parts is a problem, if all parts have run.

Patience: the summary has the highest factor by which a worker's time limits were multiplied (`tests/rig/patience.py`).

The contract: each part of it that a whole run of the everyday tests (`make test`) does not cover is a problem
(`tests/contract.py`).

With pytest-xdist, each worker sends its problems to the controller when it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import COVERAGE
from tests.rig.patience import highest_patience

OUTCOMES = "outcomes"
MOMENTS = "moments"
REQUIRED = "required"

_PROBLEMS = pytest.StashKey[list[str]]()
_COUNTS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
_OUTPUT_KEY = "gpudock_run_problems"
_COVERAGE_KEY = "gpudock_coverage"
_PATIENCES = pytest.StashKey[list[float]]()
_PATIENCE_KEY = "gpudock_patience"
# The option `-m` with which the Makefile selects the everyday tests.
_EVERYDAY = "not deep"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--moments`, the file for the list of moments at which daemons were killed."""
    parser.addoption("--moments", type=Path, default=None, help="write the moments at which daemons were killed")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin, and begin without problems."""
    config.stash[_PROBLEMS] = []
    config.stash[_COUNTS] = {}
    config.stash[_PATIENCES] = []
    config.pluginmanager.register(_Counts(config), "gpudock run report")


def _is_everyday(config: pytest.Config) -> bool:
    """Whether the run has all everyday tests."""
    narrowed = config.args_source is pytest.Config.ArgsSource.ARGS or any(
        config.getoption(option, None) for option in ("keyword", "deselect", "ignore", "ignore_glob", "lf", "stepwise")
    )
    return config.getoption("markexpr") == _EVERYDAY and not narrowed


class _Counts:
    """Collects the required counts, and the kinds of operations that were killed, of all workers."""

    def __init__(self, config: pytest.Config) -> None:
        self._counts = config.stash[_COUNTS]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the counts of a test that has run."""
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == REQUIRED and isinstance(value, dict):
                self._counts.setdefault(report.nodeid.partition("[")[0], []).append(value)
            if name == MOMENTS and isinstance(value, dict) and value.get("tried"):
                COVERAGE.kinds.add(value["kind"])


def _missing(counts: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """A sentence for each required event that has occurred in no part."""
    for test, parts in counts.items():
        if len(parts) < parts[0]["parts"]:
            continue
        for event in parts[0]["counts"]:
            if not any(part["counts"][event] for part in parts):
                yield f"{test}: {event!r} has not occurred"


@pytest.fixture(scope="session")
def run_problems(pytestconfig: pytest.Config) -> list[str]:
    """The problems of the run; a fixture or a test appends to them."""
    return pytestconfig.stash[_PROBLEMS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send a worker's problems to the controller; in the controller, fail the run if there are problems."""
    problems = session.config.stash[_PROBLEMS]
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_OUTPUT_KEY] = problems
        output[_COVERAGE_KEY] = COVERAGE.to_lists()
        output[_PATIENCE_KEY] = highest_patience()
        return
    problems += _missing(session.config.stash[_COUNTS])
    ended = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if ended and not session.shouldfail and not session.shouldstop and _is_everyday(session.config):
        problems += COVERAGE.missing()
    if problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the problems of a worker of pytest-xdist that has ended."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[_PROBLEMS].extend(output.get(_OUTPUT_KEY, ()))
    if _COVERAGE_KEY in output:
        COVERAGE.merge(output[_COVERAGE_KEY])
    if _PATIENCE_KEY in output:
        node.config.stash[_PATIENCES].append(output[_PATIENCE_KEY])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the tables of outcomes and moments, the coverage of the contract, and then the problems."""
    rows = {nodeid.rpartition("[")[2].rstrip("]"): value for nodeid, value in _values(terminalreporter, OUTCOMES)}
    if rows:
        terminalreporter.section("how calls ended")
    for row, counts in sorted(rows.items()):
        cells = (f"{status} {count}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
        terminalreporter.line(f"{row:26} {', '.join(cells)}")
    _show_moments(terminalreporter)
    if _is_everyday(terminalreporter.config):
        terminalreporter.section("coverage of the contract")
        terminalreporter.line(str(COVERAGE))
    patience = max([highest_patience(), *terminalreporter.config.stash[_PATIENCES]])
    terminalreporter.line(f"time limits were at most {patience:.1f} times as long as on an idle machine")
    for problem in terminalreporter.config.stash[_PROBLEMS]:
        terminalreporter.section("problem of the run", red=True)
        terminalreporter.line(problem)


def _values(terminalreporter: pytest.TerminalReporter, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The id of each test that has a property, with its value."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == key and getattr(report, "when", "") == "call":
                    yield report.nodeid, value


def _show_moments(terminalreporter: pytest.TerminalReporter) -> None:
    """Show how many of the known moments each test has tried; write all of them to the file of `--moments`."""
    rows = sorted((node, value) for node, value in _values(terminalreporter, MOMENTS) if "kind" in value)
    if not rows:
        return
    lines, listed = [], []
    for nodeid, value in rows:
        test = nodeid.rpartition("/")[2]
        counts = f"{len(value['tried'])} of {len(value['known'])} moments, {value['seconds']} s"
        lines.append(f"{value['kind']:16} {test:70} {counts}")
        listed.append(f"{lines[-1]} (at least {value['least']}, GPUDOCK_MOMENTS_SEED={value['seed']})")
        known = [*value["known"], *(moment for moment in value["tried"] if moment not in value["known"])]
        listed += [f"    {'tried' if moment in value['tried'] else '     '}  {moment}" for moment in known]
    terminalreporter.section(f"moments at which daemons were killed (seeds: {', '.join(_seeds(rows))})")
    for line in lines:
        terminalreporter.line(line)
    if (path := terminalreporter.config.getoption("--moments")) is not None:
        path.write_text("\n".join(listed) + "\n", encoding="utf-8")


def _seeds(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The seeds of all workers."""
    return sorted({value["seed"] for _, value in rows})
