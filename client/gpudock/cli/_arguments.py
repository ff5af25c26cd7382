"""The types of option values. A value that cannot be parsed is a usage error, before anything is sent."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import TypeVar, cast

import click

from gpudock._spec import restart_policy
from gpudock.v1.container_pb2 import Mount, PortRequest, RestartPolicy, TmpfsMount
from gpudock.v1.container_service_pb2 import ContainerPort
from gpudock.v1.port_pb2 import PORT_PROTOCOL_TCP, PORT_PROTOCOL_UDP

T = TypeVar("T")

_WHOLE = re.compile(r"\d+", re.ASCII)
_DECIMAL = re.compile(r"\d+(\.\d+)?|\.\d+", re.ASCII)
_SIGNS = ("+", "-")
# The largest int32 and int64 of a message.
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

# As docker's units.RAMInBytes: a unit is a power of 1024, with or without `b` or `ib`.
_SIZE = re.compile(r"(\d+)(?:\.(\d+))? ?([A-Za-z]*)", re.ASCII)
_UNITS: dict[str, int] = {"": 1, "b": 1}
_UNITS |= {suffix: 1024**power for power, unit in enumerate("kmgtp", 1) for suffix in (unit, f"{unit}b", f"{unit}ib")}

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)
_SPAN_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_SPAN_SECONDS = 366 * 86400

_PORT = re.compile(r"(?:(\d{1,5}):)?(\d{1,5})(?:/(tcp|udp))?", re.ASCII)
_LAST_PORT = 65535
_PROTOCOLS = {"": PORT_PROTOCOL_TCP, "tcp": PORT_PROTOCOL_TCP, "udp": PORT_PROTOCOL_UDP}


class TextParameter(click.ParamType[T]):
    """A value that is parsed from text; `parse` raises ValueError with what is wrong and what would be right."""

    def parse(self, text: str) -> T:
        """Return the value of `text`."""
        raise NotImplementedError

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002 - click's
        """Return the name of the value for help; click would print it in upper case."""
        return self.name

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """Parse the value or raise a usage error. click may pass a value that is already converted."""
        if not isinstance(value, str):
            return cast("T", value)
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def reject_sign(text: str) -> None:
    """Raise ValueError for a number with a sign, which looks like a relative change; options take absolute values."""
    if text.startswith(_SIGNS):
        raise ValueError(f"{text!r} has a sign; give the absolute value without a sign")


class WholeNumber(TextParameter[int]):
    """A whole number from `least` to `most`, both inclusive."""

    name = "NUMBER"

    def __init__(self, least: int = 0, most: int = INT32_MAX) -> None:
        """`most` is the limit of the message field; the daemon enforces smaller limits."""
        self._least, self._most = least, most

    def parse(self, text: str) -> int:
        """Return the number."""
        reject_sign(text)
        if not _WHOLE.fullmatch(text):
            raise ValueError(f"{text!r} is not a whole number; give one such as {max(self._least, 2)}")
        digits = text.lstrip("0") or "0"
        if len(digits) > len(str(self._most)) or not self._least <= int(digits) <= self._most:
            raise ValueError(f"{digits[:24]} is out of range: the number must be {self._least} to {self._most}")
        return int(digits)


REVISION_NUMBER = WholeNumber(1, INT64_MAX)
"""The number of a revision."""


ALL_GPUS = -1
"""As a number of GPUs: all free ones."""


class GpuCount(WholeNumber):
    """A number of GPUs, or `all`."""

    name = "NUMBER|all"

    def parse(self, text: str) -> int:
        """Return the number, or ALL_GPUS."""
        return ALL_GPUS if text == "all" else super().parse(text)


class Decimal(TextParameter[float]):
    """A number with or without decimals, such as `1.5`."""

    name = "NUMBER"

    def parse(self, text: str) -> float:
        """Return the number."""
        reject_sign(text)
        if not _DECIMAL.fullmatch(text):
            raise ValueError(f"{text!r} is not a number; give one such as 2 or 1.5")
        return float(text)


class Positive(Decimal):
    """A decimal number greater than 0."""

    def parse(self, text: str) -> float:
        """Return the number."""
        number = super().parse(text)
        if not number:
            raise ValueError(f"{text!r} is too small; give a number above 0")
        return number


class Key(TextParameter[str]):
    """The name of a variable or a label, without its value."""

    name = "NAME"

    def parse(self, text: str) -> str:
        """Return the name unchanged."""
        if not text or "=" in text:
            raise ValueError(f"{text!r} is not a name; give the name alone, without a value")
        return text


class Size(TextParameter[int]):
    """A number of bytes, parsed as docker does: `8G`, `8GB` and `8GiB` are all 8 * 1024**3."""

    name = "SIZE"

    def parse(self, text: str) -> int:
        """Return the number of bytes."""
        reject_sign(text)
        match = _SIZE.fullmatch(text)
        unit = _UNITS.get(match[3].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(f"invalid size {text!r}; use 512MiB, 8g, 1.5GiB or a number of bytes")
        whole, fraction = match[1], match[2] or ""
        size, rest = divmod(int(whole + fraction) * unit, int("1" + "0" * len(fraction)))
        if rest and not size:
            # Rounding to 0 would mean "no limit".
            raise ValueError(f"{text!r} is less than one byte; use a larger size")
        if size > INT64_MAX:
            raise ValueError(f"{text!r} is too large; the largest size is {INT64_MAX} bytes")
        return size


class TimeSpan(TextParameter[timedelta]):
    """A duration: `10` (seconds), `10s`, `500ms`, `5m`, `2h`, `1d`."""

    name = "TIME"

    def parse(self, text: str) -> timedelta:
        """Return the duration."""
        reject_sign(text)
        match = _SPAN.fullmatch(text)
        if match is None:
            raise ValueError(f"invalid duration {text!r}; use 30s, 500ms, 5m, 2h or a number of seconds")
        seconds = float(match[1]) * _SPAN_SECONDS[match[2] or ""]
        if seconds > _LONGEST_SPAN_SECONDS:
            raise ValueError(f"{text!r} is too long; the longest duration is 366d")
        return timedelta(seconds=seconds)


class Port(TextParameter[PortRequest]):
    """A port to publish: `CONTAINER`, `HOST:CONTAINER`, each with `/udp` if it is not TCP."""

    name = "[HOST:]CONTAINER[/udp]"

    def parse(self, text: str) -> PortRequest:
        """Return the request; without a host port the daemon allocates one from its range."""
        match = _PORT.fullmatch(text)
        if match is None:
            raise ValueError(f"invalid port {text!r}; use 80, 8080:80 or 53/udp")
        host, container = int(match[1] or 0), int(match[2])
        if not 0 < container <= _LAST_PORT or not 0 <= host <= _LAST_PORT or (match[1] and not host):
            raise ValueError(f"invalid port {text!r}; a port is 1 to {_LAST_PORT}")
        return PortRequest(container_port=container, host_port=host, protocol=_PROTOCOLS[match[3] or ""])


class ContainerPortParameter(TextParameter[ContainerPort]):
    """A port of a container: `80`, `53/udp`."""

    name = "CONTAINER[/udp]"

    def parse(self, text: str) -> ContainerPort:
        """Return the port; TCP unless it ends in /udp."""
        request = Port().parse(text)
        if request.host_port:
            raise ValueError(
                f"{text!r} has a host port; give the container port alone, such as {request.container_port}"
            )
        return ContainerPort(container_port=request.container_port, protocol=request.protocol)


class Bind(TextParameter[Mount]):
    """A volume or a path of the host: `data:/data`, `/srv/data:/data:ro`."""

    name = "SOURCE:TARGET[:ro]"

    def parse(self, text: str) -> Mount:
        """Return the mount; a source that begins with a slash is a path of the host, any other is a volume."""
        source, colon, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        if not colon or not source or not target or mode not in {"", "ro", "rw"}:
            raise ValueError(f"invalid mount {text!r}; use data:/data or /srv/data:/data:ro")
        if source.startswith("/"):
            return Mount(host_path=source, target=target, read_only=mode == "ro")
        return Mount(volume=source, target=target, read_only=mode == "ro")


class Tmpfs(TextParameter[Mount]):
    """A tmpfs: `/scratch`, `/scratch:2G`."""

    name = "TARGET[:SIZE]"

    def parse(self, text: str) -> Mount:
        """Return the mount."""
        target, colon, size = text.partition(":")
        return Mount(tmpfs=TmpfsMount(size_bytes=Size().parse(size) if colon else 0), target=target)


class KeyValueParameter(TextParameter[tuple[str, str]]):
    """`KEY=VALUE`; the value may be empty and may contain `=`."""

    name = "KEY=VALUE"

    def parse(self, text: str) -> tuple[str, str]:
        """Return key and value."""
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ValueError(f"{text!r} has no value; give KEY=VALUE")
        return key, value


class Variable(TextParameter[tuple[str, str]]):
    """`NAME=VALUE`, or `NAME` for the value in the environment of the command."""

    name = "NAME[=VALUE]"

    def parse(self, text: str) -> tuple[str, str]:
        """Return name and value."""
        name, sign, value = text.partition("=")
        if not name:
            raise ValueError(f"{text!r} has no name before the =; give NAME=VALUE")
        if sign:
            return name, value
        if name not in os.environ:
            raise ValueError(f"{name!r} is not set in the environment of this command; give {name}=VALUE")
        return name, os.environ[name]


class LabelFilter(TextParameter[tuple[str, str]]):
    """`KEY=VALUE`, or `KEY` for any value."""

    name = "KEY[=VALUE]"

    def parse(self, text: str) -> tuple[str, str]:
        """Return key and value; an empty value means any."""
        key, _, value = text.partition("=")
        if not key:
            raise ValueError(f"{text!r} has no key; give KEY or KEY=VALUE")
        return key, value


class Restart(TextParameter[RestartPolicy]):
    """A restart policy."""

    name = "no|always|unless-stopped|on-failure[:COUNT]"

    def parse(self, text: str) -> RestartPolicy:
        """Return the policy."""
        return restart_policy(text)
