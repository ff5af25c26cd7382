"""What stands behind a key: a record as JSON beside the number of the schema that it is written in.

`{"schema": 1, "record": {...}}`, UTF-8, without spaces. Times are RFC 3339, durations ISO 8601, as pydantic has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpudock_server.adapters.etcd.keys import SCHEMA
from gpudock_server.errors import RecordUnreadable
from gpudock_server.model.operation import Operation
from gpudock_server.model.record import JsonObject, Record
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.snapshot import Snapshot, SnapshotSkipped

R = TypeVar("R", bound=Record)


class _Envelope(BaseModel, Generic[R]):
    model_config = ConfigDict(frozen=True)

    # Not called `schema`, which is a method of BaseModel.
    schema_number: int = Field(alias="schema")
    record: R


class _SchemaNumber(BaseModel):
    number: int = Field(alias="schema")


def encode(record: Record) -> bytes:
    """A record as it is stored. Equal records give equal bytes."""
    return b'{"schema":%d,"record":%s}' % (SCHEMA, record.model_dump_json().encode())


def decode(kind: type[R], key: bytes, value: bytes) -> R:
    """The record of type `kind` that `value` holds; `key` is for the error. Raises RecordUnreadable."""
    try:
        return _Envelope[kind].model_validate_json(value).record  # type: ignore[valid-type]  # the type is made at run time
    except ValidationError as error:
        if (upgraded := _upgraded(kind, value)) is not None:
            return upgraded
        raise RecordUnreadable(key=key.decode(errors="replace"), detail=_reason(value, error)) from error


def decode_snapshot(key: bytes, value: bytes) -> Snapshot | SnapshotSkipped:
    """What `value` says of a revision's files. Raises RecordUnreadable."""
    try:
        return decode(SnapshotSkipped, key, value)
    except RecordUnreadable:
        return decode(Snapshot, key, value)


def _upgraded(kind: type[R], value: bytes) -> R | None:
    """The record of a value that an older daemon wrote in a form of its time; None where it is not that."""
    try:
        schema_number = _SchemaNumber.model_validate_json(value).number
        upgrade = _UPGRADES.get((kind, schema_number))
        return kind.model_validate_json(json.dumps(upgrade(json.loads(value)["record"]))) if upgrade else None
    except (ValidationError, ValueError, KeyError, TypeError):
        return None


def _operation_from_1(record: JsonObject) -> JsonObject:
    """An operation could work on containers alone, and named one in two fields."""
    rest = {name: value for name, value in record.items() if name not in ("container", "container_uid")}
    target = ResourceRef(
        kind=ResourceKind.CONTAINER, name=str(record["container"]), uid=str(record["container_uid"])
    ).model_dump(mode="json")
    return {**rest, "target": target}


# By the type of a record and the schema it was written in. Whatever an older schema had in the same form needs none.
_UPGRADES: Mapping[tuple[type[Record], int], Callable[[JsonObject], JsonObject]] = {(Operation, 1): _operation_from_1}


def _reason(value: bytes, error: ValidationError) -> str:
    try:
        schema_number = _SchemaNumber.model_validate_json(value).number
    except ValidationError:
        return "this is not a value of gpudock's"
    if schema_number > SCHEMA:
        return f"written in schema {schema_number}, and this daemon knows {SCHEMA}: a newer gpudock is at work here"
    return str(error)


def encode_number(number: int) -> bytes:
    """A bare number as it is stored."""
    return str(number).encode("ascii")


def decode_number(key: bytes, value: bytes) -> int:
    """The bare number that `value` holds. Raises RecordUnreadable."""
    try:
        return int(value)
    except ValueError as error:
        raise RecordUnreadable(key=key.decode(errors="replace"), detail=f"{value[:40]!r} is not a number") from error
