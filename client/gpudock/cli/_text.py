"""Values as text."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

_STEP = 1024
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def printable(text: str) -> str:
    """Return `text` with control characters escaped, since it may come from anywhere and go to a terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def bytes_text(number: int) -> str:
    """Return a number of bytes with a unit, such as `1.5 GiB`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < _STEP:
            return f"{number} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= _STEP
    return f"{value:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """Return a duration in seconds as `3.4s`, `2m05s` or `1h02m`."""
    if seconds < _MINUTE:
        return f"{max(seconds, 0.0):.1f}s"
    minutes, rest = divmod(int(seconds), _MINUTE)
    if minutes < _HOUR // _MINUTE:
        return f"{minutes}m{rest:02}s"
    return f"{minutes // 60}h{minutes % 60:02}m"


def age_text(moment: Timestamp) -> str:
    """Return the age of a timestamp, such as `3m` or `2d`; empty if it is not set."""
    if not moment.seconds:
        return ""
    seconds = int((datetime.now(UTC) - moment.ToDatetime(UTC)).total_seconds())
    if seconds < _MINUTE:
        return f"{max(seconds, 0)}s"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE}m"
    return f"{seconds // _HOUR}h" if seconds < _DAY else f"{seconds // _DAY}d"


def moment_text(moment: Timestamp) -> str:
    """Return a timestamp in local time; empty if it is not set."""
    if not moment.seconds:
        return ""
    return moment.ToDatetime(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
