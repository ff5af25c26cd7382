"""The error of a daemon that cannot start."""

from __future__ import annotations

from typing_extensions import override


class StartupError(Exception):
    """The daemon cannot start. `message` says why, `hint` what to do; each is printed to stderr as one line."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @override
    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message
