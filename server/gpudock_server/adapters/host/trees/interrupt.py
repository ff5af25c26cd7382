"""A flag that ends a long tree walk early."""

from __future__ import annotations


class Interrupted(Exception):
    """A walk was interrupted. Its caller is being cancelled and does not see this error."""


class Interrupt:
    """A flag that long walks check between two entries."""

    def __init__(self) -> None:
        self._raised = False

    def set(self) -> None:
        """Request the end of the walk."""
        self._raised = True

    def check(self) -> None:
        """Raise Interrupted if the end was requested."""
        if self._raised:
            raise Interrupted
