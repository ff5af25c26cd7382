"""Which parameters of a test belong to `make test` and which to `make test-deep`: docs/testing.md has the rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def deep_except(everyday: Collection[object], values: Iterable[object]) -> list[Any]:
    """Values for `pytest.mark.parametrize`, in their order: all but those in `everyday` are marked deep.

    Raises AssertionError if a value of `everyday` is none of `values`, since no test would run then.
    """
    listed = list(values)
    assert all(one in listed for one in everyday), f"of {everyday} at least one is not among {listed}"
    return [one if one in everyday else pytest.param(one, marks=pytest.mark.deep) for one in listed]
