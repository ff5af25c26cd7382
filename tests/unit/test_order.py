"""The order in which several workers run the tests."""

import pytest

from tests.order import distribute


def _duration(name: str) -> float:
    return float(name) if name.isdigit() else 0


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("names", ["", "a", "abcdefgh", "a3b1c9d2e", "12345", "abcdefghijklmnopqrstuvwxy9z"])
def test_every_test_is_distributed_once_and_short_tests_keep_their_order(names: str, workers: int) -> None:
    order = distribute(names, _duration, workers)
    assert sorted(order) == sorted(names)
    assert [name for name in order if name.isalpha()] == [name for name in names if name.isalpha()]


def test_each_worker_begins_with_its_share_of_the_long_tests() -> None:
    assert "".join(distribute("abc1def9ghi5jkl7", _duration, 2)) == "95abcdef" + "71ghijkl"
    assert "".join(distribute("abc1def9ghi", _duration, 1)) == "91abcdefghi"
