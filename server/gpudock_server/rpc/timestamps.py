"""Converts times and durations."""

from __future__ import annotations

from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

_MICROSECOND = timedelta(microseconds=1)
_MICROSECONDS = 1_000_000


def timestamp(moment: datetime | None) -> Timestamp | None:
    """A Timestamp for a time with a time zone; None for None."""
    if moment is None:
        return None
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def duration(span: timedelta | None) -> Duration | None:
    """A Duration; None for None."""
    if span is None:
        return None
    # In whole microseconds: a float would turn 30 s into 29.999999999 s.
    seconds, rest = divmod(span // _MICROSECOND, _MICROSECONDS)
    if seconds < 0 < rest:
        # Both parts of a Duration must have the same sign.
        seconds, rest = seconds + 1, rest - _MICROSECONDS
    return Duration(seconds=seconds, nanos=rest * 1000)
