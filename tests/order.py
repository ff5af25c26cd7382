"""The order in which several workers run the tests: what takes long comes first, so that none is left alone with it.

`--dist worksteal` gives each worker one stretch of the list, and lets who has finished take from the end of another's.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def distribute(items: Sequence[T], seconds: Callable[[T], float], workers: int) -> list[T]:
    """All of `items`: at the head of each worker's stretch a share of those with `seconds`, the longest first.

    The others keep their order: neighbours share what their module has set up.
    """
    long = sorted(filter(seconds, items), key=seconds, reverse=True)
    short = [item for item in items if not seconds(item)]
    ordered: list[T] = []
    for worker in range(workers):
        mine = long[worker::workers]
        # As pytest-xdist divides them.
        size = (len(items) - len(ordered)) // (workers - worker)
        rest = max(0, size - len(mine))
        ordered += mine + short[:rest]
        del short[:rest]
    return ordered + short
