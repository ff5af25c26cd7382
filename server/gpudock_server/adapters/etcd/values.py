"""What stands behind a key: a record as JSON beside the number of the schema that it is written in.

`{"schema": 1, "record": {...}}`, UTF-8, without spaces. Times are RFC 3339, durations ISO 8601, as pydantic has them.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpudock_server.adapters.etcd.keys import SCHEMA
from gpudock_server.model.record import Record

R = TypeVar("R", bound=Record)


class UnreadableValueError(Exception):
    """Something under our prefix that this version of gpudock did not write, or cannot read any more."""


class _Envelope(BaseModel, Generic[R]):
    model_config = ConfigDict(frozen=True)

    # Not called `schema`, which is a method of BaseModel.
    written_in: int = Field(alias="schema")
    record: R


class _WrittenIn(BaseModel):
    number: int = Field(alias="schema")


def encode(record: Record) -> bytes:
    """A record as it is stored. Equal records give equal bytes."""
    return b'{"schema":%d,"record":%s}' % (SCHEMA, record.model_dump_json().encode())


def decode(kind: type[R], key: bytes, value: bytes) -> R:
    """The record of type `kind` that `value` holds; `key` is for the error. Raises UnreadableValueError."""
    try:
        return _Envelope[kind].model_validate_json(value).record  # type: ignore[valid-type]
    except ValidationError as error:
        raise UnreadableValueError(f"{key.decode(errors='replace')}: {_reason(value, error)}") from error


def _reason(value: bytes, error: ValidationError) -> str:
    try:
        written_in = _WrittenIn.model_validate_json(value).number
    except ValidationError:
        return "this is not a value of gpudock's"
    if written_in > SCHEMA:
        return f"written in schema {written_in}, and this daemon knows {SCHEMA}: a newer gpudock is at work here"
    return str(error)


def encode_number(number: int) -> bytes:
    """A bare number as it is stored."""
    return str(number).encode("ascii")


def decode_number(key: bytes, value: bytes) -> int:
    """The bare number that `value` holds. Raises UnreadableValueError."""
    try:
        return int(value)
    except ValueError as error:
        raise UnreadableValueError(f"{key.decode(errors='replace')}: {value[:40]!r} is not a number") from error
