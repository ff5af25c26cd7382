"""Refusals at start: what is wrong, and what its operator can do about it."""

from __future__ import annotations

from typing_extensions import override


class StartupError(Exception):
    """The daemon cannot start. `message` says why, `hint` what to do; both go to stderr, a line each."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @override
    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message
