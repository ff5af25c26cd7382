"""Values in etcd: a record as JSON together with the number of its schema.

`{"schema": 1, "record": {...}}`, UTF-8, without spaces. Times are RFC 3339, durations ISO 8601, as in pydantic.
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

    # BaseModel has a method `schema`.
    schema_number: int = Field(alias="schema")
    record: R


class _SchemaNumber(BaseModel):
    number: int = Field(alias="schema")


def encode(record: Record) -> bytes:
    """The value of a record. Equal records have equal values."""
    return b'{"schema":%d,"record":%s}' % (SCHEMA, record.model_dump_json().encode())


def decode(kind: type[R], key: bytes, value: bytes) -> R:
    """The record of type `kind` in `value`; `key` is for the error. Raises RecordUnreadable."""
    try:
        return _Envelope[kind].model_validate_json(value).record  # type: ignore[valid-type]  # the type is made at run time
    except ValidationError as error:
        if (upgraded := _upgraded(kind, value)) is not None:
            return upgraded
        raise RecordUnreadable(key=key.decode(errors="replace"), detail=_reason(value, error)) from error


def decode_snapshot(key: bytes, value: bytes) -> Snapshot | SnapshotSkipped:
    """The snapshot in `value`, or the reason why there is none. Raises RecordUnreadable."""
    try:
        return decode(SnapshotSkipped, key, value)
    except RecordUnreadable:
        return decode(Snapshot, key, value)


def _upgraded(kind: type[R], value: bytes) -> R | None:
    """The record in a value with an older schema; None if there is no upgrade from it."""
    try:
        schema_number = _SchemaNumber.model_validate_json(value).number
        upgrade = _UPGRADES.get((kind, schema_number))
        return kind.model_validate_json(json.dumps(upgrade(json.loads(value)["record"]))) if upgrade else None
    except (ValidationError, ValueError, KeyError, TypeError):
        return None


def _operation_from_1(record: JsonObject) -> JsonObject:
    """In schema 1 the target of an operation was a container, in two fields."""
    rest = {name: value for name, value in record.items() if name not in ("container", "container_uid")}
    target = ResourceRef(
        kind=ResourceKind.CONTAINER, name=str(record["container"]), uid=str(record["container_uid"])
    ).model_dump(mode="json")
    return {**rest, "target": target}


# By record type and the schema of the value. Records that have not changed since a schema need no upgrade.
_UPGRADES: Mapping[tuple[type[Record], int], Callable[[JsonObject], JsonObject]] = {(Operation, 1): _operation_from_1}


def _reason(value: bytes, error: ValidationError) -> str:
    try:
        schema_number = _SchemaNumber.model_validate_json(value).number
    except ValidationError:
        return "not a gpudock record"
    if schema_number > SCHEMA:
        return f"written in schema {schema_number} by a newer gpudock; this daemon supports schemas up to {SCHEMA}"
    return str(error)


def encode_number(number: int) -> bytes:
    """The value of a number."""
    return str(number).encode("ascii")


def decode_number(key: bytes, value: bytes) -> int:
    """The number in `value`. Raises RecordUnreadable."""
    try:
        return int(value)
    except ValueError as error:
        raise RecordUnreadable(key=key.decode(errors="replace"), detail=f"{value[:40]!r} is not a number") from error
