"""The kinds of values that options take. What cannot be read is a usage error before anything is sent."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Generic, TypeVar, cast

import click

from gpudock._spec import restart_policy
from gpudock.v1.container_pb2 import Mount, PortRequest, RestartPolicy, TmpfsMount
from gpudock.v1.port_pb2 import PORT_PROTOCOL_TCP, PORT_PROTOCOL_UDP

T = TypeVar("T")

REVISION_NUMBER = click.IntRange(1, 2**63 - 1)
"""The number of a revision; how far they go is for the server to say."""

_SIZE = re.compile(r"(\d+)(?:\.(\d+))?([A-Za-z]*)", re.ASCII)
_UNITS: dict[str, int] = {"": 1, "b": 1}
_UNITS |= {suffix: 1024**power for power, unit in enumerate("kmgt", 1) for suffix in (unit, f"{unit}ib")}
_UNITS |= {f"{unit}b": 1000**power for power, unit in enumerate("kmgt", 1)}
_LARGEST = 2**63 - 1

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)
_SPAN_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_SPAN_SECONDS = 366 * 86400

_PORT = re.compile(r"(?:(\d{1,5}):)?(\d{1,5})(?:/(tcp|udp))?", re.ASCII)
_LAST_PORT = 65535
_PROTOCOLS = {"": PORT_PROTOCOL_TCP, "tcp": PORT_PROTOCOL_TCP, "udp": PORT_PROTOCOL_UDP}


class Parsed(click.ParamType, Generic[T]):  # type: ignore[type-arg] # click 8.1 has it without
    """A value that is read from text; `parse` raises ValueError with what is wrong."""

    def parse(self, text: str) -> T:
        """The value in `text`."""
        raise NotImplementedError

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """Read it, or end with a usage error. click may hand over a value that it has converted before."""
        if not isinstance(value, str):
            return cast("T", value)
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Size(Parsed[int]):
    """A number of bytes: `8G` and `8GiB` are powers of 1024, `8GB` of 1000."""

    name = "SIZE"

    def parse(self, text: str) -> int:
        """The number of bytes."""
        match = _SIZE.fullmatch(text)
        unit = _UNITS.get(match[3].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(f"{text!r} is no size such as 512MiB, 8G or 1.5GB")
        whole, fraction = match[1], match[2] or ""
        size, rest = divmod(int(whole + fraction) * unit, int("1" + "0" * len(fraction)))
        if rest:
            raise ValueError(f"{text!r} is no whole number of bytes")
        if size > _LARGEST:
            raise ValueError(f"{text!r} is more than any machine has")
        return size


class Span(Parsed[timedelta]):
    """A span of time: `10`, `10s`, `500ms`, `5m`, `2h`, `1d`."""

    name = "TIME"

    def parse(self, text: str) -> timedelta:
        """The span."""
        match = _SPAN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no time such as 30s, 500ms, 5m or 2h")
        seconds = float(match[1]) * _SPAN_SECONDS[match[2] or ""]
        if seconds > _LONGEST_SPAN_SECONDS:
            raise ValueError(f"{text!r} is more than a year")
        return timedelta(seconds=seconds)


class Port(Parsed[PortRequest]):
    """A port to publish: `CONTAINER`, `HOST:CONTAINER`, each with `/udp` if it is not TCP."""

    name = "[HOST:]CONTAINER[/udp]"

    def parse(self, text: str) -> PortRequest:
        """The request; without a host port the server takes one of its range."""
        match = _PORT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no port such as 80, 8080:80 or 53/udp")
        host, container = int(match[1] or 0), int(match[2])
        if not 0 < container <= _LAST_PORT or not 0 <= host <= _LAST_PORT or (match[1] and not host):
            raise ValueError(f"{text!r}: ports are from 1 to {_LAST_PORT}")
        return PortRequest(container_port=container, host_port=host, protocol=_PROTOCOLS[match[3] or ""])


class Bind(Parsed[Mount]):
    """A volume or a path of the node: `data:/data`, `/srv/data:/data:ro`."""

    name = "SOURCE:TARGET[:ro]"

    def parse(self, text: str) -> Mount:
        """The mount; a source that begins with a slash is a path of the node, any other one a volume."""
        source, colon, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        if not colon or not source or not target or mode not in {"", "ro", "rw"}:
            raise ValueError(f"{text!r} is no mount such as data:/data or /srv/data:/data:ro")
        if source.startswith("/"):
            return Mount(host_path=source, target=target, read_only=mode == "ro")
        return Mount(volume=source, target=target, read_only=mode == "ro")


class Tmpfs(Parsed[Mount]):
    """A file system in memory: `/scratch`, `/scratch:2G`."""

    name = "TARGET[:SIZE]"

    def parse(self, text: str) -> Mount:
        """The mount."""
        target, colon, size = text.partition(":")
        return Mount(tmpfs=TmpfsMount(size_bytes=Size().parse(size) if colon else 0), target=target)


class Pair(Parsed[tuple[str, str]]):
    """`KEY=VALUE`; the value may be empty and may contain `=`."""

    name = "KEY=VALUE"

    def parse(self, text: str) -> tuple[str, str]:
        """Key and value."""
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ValueError(f"{text!r} is not KEY=VALUE")
        return key, value


class LabelFilter(Parsed[tuple[str, str]]):
    """`KEY=VALUE`, or `KEY` for any value."""

    name = "KEY[=VALUE]"

    def parse(self, text: str) -> tuple[str, str]:
        """Key and value, which is empty for any."""
        key, _, value = text.partition("=")
        if not key:
            raise ValueError(f"{text!r} is not KEY or KEY=VALUE")
        return key, value


class Restart(Parsed[RestartPolicy]):
    """When the engine starts the process again."""

    name = "no|always|unless-stopped|on-failure[:COUNT]"

    def parse(self, text: str) -> RestartPolicy:
        """The policy."""
        return restart_policy(text)
