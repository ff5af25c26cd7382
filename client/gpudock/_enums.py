"""Conversion between enum values and words: `RUNNING` or `running` for CONTAINER_STATE_RUNNING."""

from __future__ import annotations

import re
from typing import Any, Protocol, TypeVar

from google.protobuf.descriptor import EnumDescriptor

V = TypeVar("V", bound=int)
V_co = TypeVar("V_co", bound=int, covariant=True)


class ProtoEnum(Protocol[V_co]):
    """A generated enum wrapper."""

    @property
    def DESCRIPTOR(self) -> EnumDescriptor: ...  # noqa: N802 - the generator's name
    def Value(self, name: str) -> V_co: ...  # noqa: N802 - the generator's name


def enum_name(enum: ProtoEnum[Any], value: int) -> str:
    """Return the name of a value without the prefix of the enum; the number of a value that is unknown here."""
    known = enum.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix(_prefix(enum)) if known else str(value)


def enum_value(enum: ProtoEnum[V], word: str) -> V:
    """Return the value for a word in either case, with dashes or underscores; raises ValueError for an unknown word."""
    try:
        return enum.Value(_prefix(enum) + word.upper().replace("-", "_"))
    except ValueError:
        raise ValueError(f"{word!r} is not one of {', '.join(enum_names(enum))}") from None


def enum_names(enum: ProtoEnum[Any]) -> tuple[str, ...]:
    """Return the words of all values in lower case with dashes, except the unspecified one."""
    names = (value.name.removeprefix(_prefix(enum)) for value in enum.DESCRIPTOR.values if value.number)
    return tuple(name.lower().replace("_", "-") for name in names)


def _prefix(enum: ProtoEnum[Any]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper() + "_"
