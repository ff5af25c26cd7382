"""The base class of records: frozen, validated, and strict about unknown fields."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict, JsonValue

JsonObject: TypeAlias = dict[str, JsonValue]


class Record(BaseModel):
    """An immutable value.

    Unknown fields are an error: a daemon that ignored the fields of a newer version would delete them when it writes
    the record again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


def now() -> datetime:
    """Return the current time in UTC, in microseconds."""
    return datetime.now(UTC)
