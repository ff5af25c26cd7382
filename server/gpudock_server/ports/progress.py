"""Progress of an action that moves bytes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (current, total) bytes; total 0: not known yet."""
