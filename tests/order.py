"""The order in which several workers run the tests: long tests come first, so that none runs after all others.

`--dist worksteal` gives each worker one stretch of the list; a worker that has finished takes tests from the end of
another worker's stretch.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def distribute(items: Sequence[T], seconds: Callable[[T], float], workers: int) -> list[T]:
    """`items` in another order: each worker's stretch begins with a share of those with `seconds`, the longest first.

    The others keep their order, since neighbouring tests share the fixtures of their module.
    """
    long = sorted(filter(seconds, items), key=seconds, reverse=True)
    short = [item for item in items if not seconds(item)]
    ordered: list[T] = []
    for worker in range(workers):
        long_share = long[worker::workers]
        # The same division as in pytest-xdist.
        size = (len(items) - len(ordered)) // (workers - worker)
        short_count = max(0, size - len(long_share))
        ordered += long_share + short[:short_count]
        del short[:short_count]
    return ordered + short
