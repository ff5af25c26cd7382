"""The choice between `make test` and `make test-deep` for parameters of a test: docs/testing.md has the rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def deep_except(everyday: Collection[object], values: Iterable[object]) -> list[Any]:
    """`values` for `pytest.mark.parametrize`, in the same order: all but those in `everyday` are marked deep.

    Raises AssertionError if a value of `everyday` is not in `values`, since no everyday test would run with it.
    """
    parameters = list(values)
    assert all(value in parameters for value in everyday), f"{everyday} must be a subset of {parameters}"
    return [value if value in everyday else pytest.param(value, marks=pytest.mark.deep) for value in parameters]
