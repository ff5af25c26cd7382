"""Sizes with units."""

from __future__ import annotations

import pytest
from gpudock_server.sizes import Rounding, size_text
from hypothesis import given
from hypothesis import strategies as st

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (65_536_000, "62.5 MiB"),
        (10 << 20, "10 MiB"),
        ((1 << 20) - 1, "1 MiB"),
        (2**63 - 1, "8388608 TiB"),
    ],
)
def test_sizes_are_written_with_a_unit(number: int, text: str) -> None:
    assert size_text(number) == text


@given(st.integers(0, 2**63 - 1))
def test_a_rounded_size_is_a_bound_of_the_exact_size(number: int) -> None:
    assert _read(size_text(number, Rounding.DOWN)) <= number <= _read(size_text(number, Rounding.UP))


def _read(text: str) -> int:
    """Return whole bytes, as the command reads a size."""
    value, unit = text.split()
    whole, _, tenth = value.partition(".")
    return (int(whole) * 10 + int(tenth or 0)) * UNITS[unit] // 10
