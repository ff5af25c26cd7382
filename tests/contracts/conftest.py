"""Which implementation a test is run against, and what a fake does not do.

A module of this folder tests one port. Its fixture is parametrised over the implementations, and its `NOT_FAKED` lists,
by the implementation's name in the test's id, each test that the fake does not pass, with the reason. Such a test is an
expected failure, shown in the summary of a run; one that passes all the same fails, so the list is never out of date.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what a fake does not do. Raises UsageError for an entry of NOT_FAKED that names no test."""
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
