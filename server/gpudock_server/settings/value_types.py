"""Types of setting values, and their parsers for text from a flag, the environment or a file."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, GetCoreSchemaHandler, PlainSerializer
from pydantic_core import CoreSchema, core_schema
from pydantic_settings import NoDecode

LAST_PORT = 65535
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)
_UNIT_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d{1,18})(?:([KMGT])(?:i?B)?)?", re.ASCII | re.IGNORECASE)
_MODE = re.compile(r"(?:0o?)?[0-7]{3}", re.ASCII)
_PORTS = re.compile(r"(\d{1,5})-(\d{1,5})", re.ASCII)
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%a-z]+\]|[^\s:/\[\]@]+):(\d{1,5})", re.ASCII)
# No colon in the last part: it would be a tag.
_VOLUME_PATTERN = re.compile(r"[A-Za-z0-9_.*-]{1,255}")
_REPOSITORY = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._:-]*/)*[a-z0-9][a-z0-9._-]*", re.ASCII)


@dataclass(frozen=True)
class Metavar:
    """The placeholder of a value in --help."""

    metavar: str


class PortRange:
    """Host ports from `first` to `last`, both included."""

    __slots__ = ("first", "last")

    def __init__(self, first: int, last: int) -> None:
        if not 1 <= first <= last <= LAST_PORT:
            raise ValueError(f"must be FIRST-LAST with 1 <= FIRST <= LAST <= {LAST_PORT}")
        self.first = first
        self.last = last

    @classmethod
    def parse(cls, value: object) -> PortRange:
        """Parse `FIRST-LAST`. Raises ValueError."""
        if isinstance(value, PortRange):
            return value
        found = _PORTS.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise ValueError("must be FIRST-LAST, as in 20000-29999")
        return cls(int(found[1]), int(found[2]))

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PortRange) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash((self.first, self.last))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    __repr__ = __str__

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.to_string_ser_schema())


def split_address(address: str) -> tuple[str, int]:
    """Split `HOST:PORT`; the brackets of an IPv6 host are removed. Raises ValueError."""
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found[2]) > LAST_PORT:
        raise ValueError("must be HOST:PORT, as in 127.0.0.1:50051 or [::1]:50051")
    return found[1].strip("[]"), int(found[2])


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this host only. A name other than localhost may resolve to any address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("must be a number of seconds, or have a unit: ms, s, m, h, d")
    return float(found[1]) * _UNITS[found[2] or "s"]


def _size(value: object) -> int:
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is not None:
        return int(found[1]) * _UNIT_BYTES[(found[2] or "").upper()]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("must be a number of bytes, or have a unit: K, M, G, T (powers of 1024)")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return value == "true"
    raise ValueError("must be true or false")


def _mode(value: object) -> int:
    mode = int(value.removeprefix("0o"), 8) if isinstance(value, str) and _MODE.fullmatch(value) else value
    # Only write permission matters for connecting to a socket. This check also refuses a bare 660 in TOML, which is a
    # decimal number.
    if mode not in (0o600, 0o660) or not isinstance(mode, int):
        raise ValueError('must be "0600" (only the user of the daemon) or "0660" (also its group)')
    return mode


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("must be an absolute path without `..`")
    return path


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


def _address(value: str) -> str:
    split_address(value)
    return value


def _list_of(check: Callable[[Any], Any]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda values: tuple(check(value) for value in values)


def _repository(value: str) -> str:
    if not _REPOSITORY.fullmatch(value.replace("{owner}", "owner")):
        raise ValueError("must be repositories without a tag, such as team/models or tenants/{owner}")
    return value


def _volume_pattern(value: str) -> str:
    if not _VOLUME_PATTERN.fullmatch(value):
        raise ValueError("must be names of engine volumes, in which * matches any characters, such as models or team-*")
    return value


COMMA_SEPARATED = (NoDecode, BeforeValidator(_split))

AbsolutePath: TypeAlias = Annotated[Path, AfterValidator(_absolute), Metavar("PATH")]
OptionalPath: TypeAlias = Annotated[AbsolutePath | None, BeforeValidator(_empty_is_none), Metavar("PATH")]
Paths: TypeAlias = Annotated[tuple[AbsolutePath, ...], *COMMA_SEPARATED, Metavar("PATH,…")]
Addresses: TypeAlias = Annotated[
    tuple[str, ...], *COMMA_SEPARATED, AfterValidator(_list_of(_address)), Metavar("HOST:PORT,…")
]
StringList: TypeAlias = Annotated[tuple[str, ...], *COMMA_SEPARATED]
Repositories: TypeAlias = Annotated[tuple[str, ...], *COMMA_SEPARATED, AfterValidator(_list_of(_repository))]
VolumePatterns: TypeAlias = Annotated[tuple[str, ...], *COMMA_SEPARATED, AfterValidator(_list_of(_volume_pattern))]
Seconds: TypeAlias = Annotated[float, BeforeValidator(_seconds), Metavar("SECONDS")]
Size: TypeAlias = Annotated[int, BeforeValidator(_size), Metavar("SIZE")]
Boolean: TypeAlias = Annotated[bool, BeforeValidator(_flag), Metavar("true|false")]
SocketMode: TypeAlias = Annotated[
    int, BeforeValidator(_mode), PlainSerializer(lambda mode: f"{mode:04o}"), Metavar("MODE")
]
