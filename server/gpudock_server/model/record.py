"""The base of everything stored: frozen, validated, and strict about unknown fields."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict, JsonValue

JsonObject: TypeAlias = dict[str, JsonValue]


class Record(BaseModel):
    """A value that is written once and replaced, never edited.

    Unknown fields are an error: a daemon that dropped what a newer one wrote, and then wrote the record back, would
    lose it silently.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


def now() -> datetime:
    """The current time in UTC, to the microsecond."""
    return datetime.now(UTC)
