"""Format numbers of bytes for people."""

from __future__ import annotations

import math
from enum import Enum

_UNITS = ("KiB", "MiB", "GiB", "TiB")
_STEP = 1024


class Rounding(Enum):
    """Direction in which a size is rounded to a tenth of its unit."""

    NEAREST = "nearest"
    UP = "up"
    DOWN = "down"


def size_text(number: int, rounding: Rounding = Rounding.NEAREST) -> str:
    """Format a number of bytes as `62.5 MiB`, `10 MiB` or `512 B`.

    Round minimum sizes up and available space down: a reader who enters the printed size again must not be refused.
    """
    if number < _STEP:
        return f"{number} B"
    power = min(int(math.log2(number)) // 10, len(_UNITS))
    tenths, rest = divmod(number * 10, _STEP**power)
    up = rest > 0 if rounding is Rounding.UP else rest * 2 >= _STEP**power
    if rounding is not Rounding.DOWN and up:
        tenths += 1
    if tenths == _STEP * 10 and power < len(_UNITS):
        tenths, power = 10, power + 1
    whole, tenth = divmod(tenths, 10)
    return f"{whole}.{tenth} {_UNITS[power - 1]}" if tenth else f"{whole} {_UNITS[power - 1]}"
