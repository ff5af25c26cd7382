"""A flag that ends a long walk early."""

from __future__ import annotations


class Interrupted(Exception):
    """A walk was told to stop; its caller is being cancelled and never sees this."""


class Interrupt:
    """A flag that long walks look at between two entries."""

    def __init__(self) -> None:
        self._raised = False

    def set(self) -> None:
        """Ask the walk to end."""
        self._raised = True

    def check(self) -> None:
        """Raise Interrupted if the walk was asked to end."""
        if self._raised:
            raise Interrupted
