"""Times and spans."""

from __future__ import annotations

from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

_MICROSECOND = timedelta(microseconds=1)
_MICROSECONDS = 1_000_000


def timestamp(moment: datetime | None) -> Timestamp | None:
    """A moment with a time zone as its message; None, an absent one, stays absent."""
    if moment is None:
        return None
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def duration(span: timedelta | None) -> Duration | None:
    """A span as its message; None, an absent one, stays absent."""
    if span is None:
        return None
    # Whole microseconds, and not through a float, which would make 29.999999999 s of 30.
    seconds, rest = divmod(span // _MICROSECOND, _MICROSECONDS)
    if seconds < 0 < rest:
        # A Duration's two parts have the same sign.
        seconds, rest = seconds + 1, rest - _MICROSECONDS
    return Duration(seconds=seconds, nanos=rest * 1000)
