"""Rules for fields of many messages. Each function adds its violations and returns the converted value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration

from gpudock_server.core.exec.sessions import signal_number
from gpudock_server.model.engine import HostCapacity
from gpudock_server.model.names import NAME_PATTERN, is_name
from gpudock_server.rpc.validation.violations import Violations
from gpudock_server.sizes import size_text

T = TypeVar("T")

UNKNOWN_HOST = HostCapacity()
NUL = "\0"
MAX_PORT = 65535
MAX_PATH_BYTES = 4095
_KIB = 1024

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)

# Limits of protobuf's Duration: https://protobuf.dev/reference/protobuf/google.protobuf/#duration
_DURATION_SECONDS = 315_576_000_000
_NANOS = 1_000_000_000

_MAX_ARGUMENTS = 1024
_MAX_ARGUMENT_BYTES = 256 * _KIB
_MAX_ENV = 1024
_MAX_ENV_BYTES = 256 * _KIB
_MAX_ENV_NAME_BYTES = 255

_OWNER = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._@/-]{0,126}[A-Za-z0-9])?", re.ASCII)
_USER_PART = re.compile(r"[^:\s\0-]([^:\s\0]{0,254})", re.ASCII)
_MAX_ID = 2**31 - 1


class MutationRequest(Protocol):
    """A request that changes a resource."""

    @property
    def name(self) -> str:
        """The name of the resource."""
        ...

    @property
    def request_id(self) -> str:
        """The id that the caller chose; empty for none."""
        ...


def check_mutation(request: MutationRequest) -> Violations:
    """Check the fields that all mutations of an existing resource share."""
    violations = Violations()
    name(violations, "name", request.name)
    optional_uuid(violations, "request_id", request.request_id)
    return violations


def name(violations: Violations, field: str, value: str) -> str:
    """The name of a container or a volume."""
    if not value:
        violations.add(field, "is required")
    elif not is_name(value):
        violations.add(field, f"must match {NAME_PATTERN}")
    return value


def owner(violations: Violations, field: str, value: str) -> str:
    """The owner of an object; may be empty."""
    if value and not _OWNER.fullmatch(value):
        violations.add(field, "must match ^[A-Za-z0-9]([A-Za-z0-9._@/-]{0,126}[A-Za-z0-9])?$")
    return value


def is_uuid(text: str) -> bool:
    """Whether `text` is a UUID in its usual form, in upper or lower case."""
    return _UUID.fullmatch(text) is not None


def optional_uuid(violations: Violations, field: str, value: str) -> str:
    """A UUID in lower case, or empty: two spellings of one UUID are the same id."""
    if value and not is_uuid(value):
        violations.add(field, "must be a UUID such as 123e4567-e89b-42d3-a456-426614174000, or empty")
    return value.lower()


def size(violations: Violations, field: str, value: int, *, minimum: int = 0) -> int:
    """A number of bytes: 0, or at least `minimum`."""
    if value < 0:
        violations.add(field, "must not be negative")
    elif 0 < value < minimum:
        violations.add(field, f"must be 0 or at least {size_text(minimum)}")
    return value


def host_memory(violations: Violations, field: str, value: int, host: HostCapacity, *, minimum: int = 0) -> int:
    """A number of bytes of the host's memory: 0, or `minimum` to what the host has."""
    if host.memory_bytes and value > host.memory_bytes:
        violations.add(field, f"is {value}; must be at most {host.memory_bytes}, the memory of this node")
        return value
    return size(violations, field, value, minimum=minimum)


def in_range(violations: Violations, field: str, value: int, first: int, last: int) -> int:
    """A number from `first` to `last`, both included."""
    if not first <= value <= last:
        violations.add(field, f"must be {first} to {last}")
    return value


def enum_value(violations: Violations, field: str, value: int, choices: Mapping[int, T], default: T) -> T:
    """The value of an enum; `default` for 0, which is _UNSPECIFIED."""
    if value == 0:
        return default
    if value not in choices:
        violations.add(field, f"is {value}; must be one of {_listed(choices)}")
        return default
    return choices[value]


def enum_values(violations: Violations, field: str, values: Iterable[int], choices: Mapping[int, T]) -> frozenset[T]:
    """The values of a repeated enum in a filter."""
    requested = set(values)
    unknown = sorted(requested - choices.keys())
    if unknown:
        # Only the first five: a filter may repeat a million values.
        violations.add(field, f"has the unknown values {_listed(unknown[:5])}; must be of {_listed(choices)}")
    return frozenset(choices[value] for value in requested & choices.keys())


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def duration(
    violations: Violations, field: str, value: Duration, minimum: timedelta, maximum: timedelta
) -> timedelta | None:
    """A duration from `minimum` to `maximum`, both included, rounded up to microseconds; None if it is invalid."""
    seconds, nanos = value.seconds, value.nanos
    if abs(seconds) > _DURATION_SECONDS or abs(nanos) >= _NANOS or seconds * nanos < 0:
        violations.add(field, "is not a valid Duration: seconds and nanos must be in range and have the same sign")
        return None
    span = timedelta(seconds=seconds, microseconds=-(-nanos // 1000))
    # Compared without rounding, so that one nanosecond too much is refused.
    total = seconds * _NANOS + nanos
    if not _nanos(minimum) <= total <= _nanos(maximum):
        violations.add(field, f"must be {_format_duration(minimum)} to {_format_duration(maximum)}")
        return None
    return span


def _nanos(span: timedelta) -> int:
    return span // timedelta(microseconds=1) * 1000


def _format_duration(span: timedelta) -> str:
    if span and span < timedelta(seconds=1):
        return f"{span // timedelta(milliseconds=1)} ms"
    return f"{span // timedelta(seconds=1)} s"


def whole_seconds(span: timedelta | None) -> float | None:
    """Seconds, rounded up to a whole number; None for None."""
    return None if span is None else float(math.ceil(span.total_seconds()))


def text(violations: Violations, field: str, value: str, *, max_bytes: int) -> str:
    """Text without NUL, of at most `max_bytes` bytes of UTF-8."""
    if NUL in value:
        violations.add(field, "must not contain NUL")
    if len(value.encode()) > max_bytes:
        violations.add(field, f"must have at most {max_bytes} bytes")
    return value


def absolute_path(violations: Violations, field: str, value: str) -> str:
    """An absolute path."""
    if not value.startswith("/"):
        violations.add(field, "must be an absolute path")
    return text(violations, field, value, max_bytes=MAX_PATH_BYTES)


def arguments(violations: Violations, *lists: tuple[str, Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """Lists of arguments that share one limit, each given with the name of its field."""
    found = [(field, tuple(values)) for field, values in lists]
    fields = " and ".join(field for field, _ in found)
    place = found[-1][0]
    if sum(len(values) for _, values in found) > _MAX_ARGUMENTS:
        violations.add(place, f"{fields} must have at most {_MAX_ARGUMENTS} arguments")
        return tuple(values for _, values in found)
    if sum(len(value.encode()) for _, values in found for value in values) > _MAX_ARGUMENT_BYTES:
        violations.add(place, f"{fields} must have at most {_MAX_ARGUMENT_BYTES} bytes in all")
    for field, values in found:
        for index, value in enumerate(values):
            if NUL in value:
                violations.add(field, "must not contain NUL", index)
    return tuple(values for _, values in found)


def program(violations: Violations, field: str, values: Iterable[str]) -> tuple[str, ...]:
    """A program and its arguments."""
    (found,) = arguments(violations, (field, values))
    if not found:
        violations.add(field, "is required")
    elif not found[0]:
        violations.add(field, "must name a program", 0)
    return found


def environment(violations: Violations, field: str, values: Mapping[str, str]) -> dict[str, str]:
    """Environment variables."""
    found = dict(values)
    if len(found) > _MAX_ENV:
        violations.add(field, f"must have at most {_MAX_ENV} entries")
        return found
    if sum(len(key.encode()) + len(value.encode()) for key, value in found.items()) > _MAX_ENV_BYTES:
        violations.add(field, f"must have at most {_MAX_ENV_BYTES} bytes in all, names and values")
    for key, value in found.items():
        if not 1 <= len(key.encode()) <= _MAX_ENV_NAME_BYTES or "=" in key or NUL in key:
            violations.add(field, f"a name must have 1 to {_MAX_ENV_NAME_BYTES} bytes and neither `=` nor NUL", key)
        if NUL in value:
            violations.add(field, "must not contain NUL", key)
    return found


def user(violations: Violations, field: str, value: str) -> str:
    """The user of a process: `name`, `uid`, `name:group` or `uid:gid`, or empty."""
    parts = value.split(":") if value else []
    if len(parts) > len(("user", "group")) or not all(_USER_PART.fullmatch(part) for part in parts):
        violations.add(field, "must be `name`, `uid`, `name:group` or `uid:gid`")
    elif any(part.isascii() and part.isdigit() and int(part) > _MAX_ID for part in parts):
        violations.add(field, f"an id must be at most {_MAX_ID}")
    return value


def signal(violations: Violations, field: str, value: str) -> str:
    """The name of a signal."""
    try:
        signal_number(value)
    except ValueError:
        violations.add(field, f"unknown signal {value!r}; use a name such as SIGTERM")
    return value
