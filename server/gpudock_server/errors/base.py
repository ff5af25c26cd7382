"""The base class of all errors, and how messages and metadata are made from an error's fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from enum import IntEnum
from typing import ClassVar

from gpudock_server.sizes import Rounding, size_text


class Code(IntEnum):
    """The codes of google.rpc.Code that gpudock uses. Operation records store them as numbers."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@dataclass(eq=False)
class GpudockError(Exception):
    """Base class of the errors that are returned to callers."""

    code: ClassVar[Code]
    reason: ClassVar[str]
    # How long a caller should wait before it repeats the call; None if repeating it soon does not help.
    retry_after: ClassVar[timedelta | None] = None

    # One sentence with the fields as placeholders: what is wrong and, where possible, what to do.
    template: ClassVar[str]

    @property
    def message(self) -> str:
        """The message for people."""
        return self.template.format_map(
            {field.name: _display_text(field.name, getattr(self, field.name)) for field in fields(self)}
        )

    @property
    def metadata(self) -> dict[str, str]:
        """All fields as text."""
        return {field.name: metadata_text(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class FieldViolation:
    """What is wrong with one field of a request; `field` is its path, such as `spec.ports[2].host_port`."""

    field: str
    description: str


def metadata_text(value: object) -> str:
    """A field's value as metadata: lists are joined with commas."""
    if isinstance(value, tuple | list):
        return ",".join(str(item) for item in value)
    return str(value)


def _display_text(name: str, value: object) -> str:
    """A field's value in a message: sizes with a unit, lists joined with commas, empty values as `none`."""
    if name.endswith("_bytes") and isinstance(value, int):
        return size_text(value, _ROUNDING.get(name, Rounding.NEAREST))
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return str(value) or "none"


# A size in a message must work when the caller copies it into the next request: round a minimum up, a maximum down.
_ROUNDING = {
    "minimum_bytes": Rounding.UP,
    "needed_bytes": Rounding.UP,
    "used_bytes": Rounding.UP,
    "available_bytes": Rounding.DOWN,
}
