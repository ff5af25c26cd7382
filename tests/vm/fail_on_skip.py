"""A pytest plugin, `-p tests.vm.fail_on_skip`: in the VM, whose purpose is that nothing is missing, a skip fails.

pytest itself fails when there is no test at all; so what ends well has run something, and all that was chosen.
"""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turns success into failure if anything was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"failed: {len(skipped)} skipped, where nothing may be", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
