"""Contract tests of ports: each test runs with every implementation of its port.

Each module tests one port, and its fixture is parametrised by the implementations. Its `NOT_FAKED` maps the name of a
fake to the tests that the fake does not pass, each with a reason. These tests are expected failures in the summary of a
run; if one passes, the run fails, so that the list stays up to date.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the expected failures of fakes. Raises UsageError for an entry of NOT_FAKED that names no test."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        for implementation, tests in getattr(module, "NOT_FAKED", {}).items():
            for name in tests:
                if not hasattr(module, name):
                    raise pytest.UsageError(f"{module.__name__}: NOT_FAKED[{implementation!r}] names no test: {name}")
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            not_faked = getattr(item.module, "NOT_FAKED", {})
            for implementation in item.callspec._idlist:
                if reason := not_faked.get(implementation, {}).get(item.originalname):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
