"""A pytest plugin, `-p tests.vm.fail_on_skip`: a run with a skipped test fails, since the VM has all requirements.

pytest itself fails if no test was selected.
"""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Make the run fail if a test was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"failed: {len(skipped)} skipped; no test may be skipped in the VM", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
