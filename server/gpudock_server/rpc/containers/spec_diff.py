"""The differences between two specs, as paths with old and new values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from gpudock.v1 import container_pb2, operation_pb2, port_pb2

_PLAIN_KEY = re.compile(r"\w+", re.ASCII)
_PACKAGE = container_pb2.DESCRIPTOR.package


def spec_changes(
    before: container_pb2.ContainerSpec, after: container_pb2.ContainerSpec
) -> list[operation_pb2.SpecChange]:
    """The differences, in the order of the fields of ContainerSpec."""
    changes: list[operation_pb2.SpecChange] = []
    for field in before.DESCRIPTOR.fields:
        old, new = _values(before, field), _values(after, field)
        if old.keys() == new.keys() and old == new and getattr(before, field.name) != getattr(after, field.name):
            # Only the order of the entries differs.
            old, new = {field.name: _text(before, field)}, {field.name: _text(after, field)}
        changes += [
            operation_pb2.SpecChange(path=path, old_value=old.get(path), new_value=new.get(path))
            for path in {**old, **new}
            if old.get(path) != new.get(path)
        ]
    return changes


def _values(spec: container_pb2.ContainerSpec, field: FieldDescriptor) -> dict[str, str]:
    """Path -> value, for all values that are set in a field."""
    value: Any = getattr(spec, field.name)
    match field.name:
        case "env" | "labels":
            return {f"{field.name}.{_key(key)}": value[key] for key in sorted(value)}
        case "mounts":
            return {f"mounts[{json.dumps(entry.target, ensure_ascii=False)}]": _json(entry) for entry in value}
        case "ports":
            return {f'ports["{_port(entry)}"]': _json(entry) for entry in value}
    if not any(field.name == present.name for present, _ in spec.ListFields()):
        return {}
    if isinstance(value, Message) and value.DESCRIPTOR.file.package == _PACKAGE:
        parts = {f"{field.name}.{part.name}": _text(value, part) for part, _ in value.ListFields()}
        # An empty message differs from an absent one: an empty health_check turns off the check of the image.
        return parts or {field.name: "{}"}
    return {field.name: _text(spec, field)}


def _text(message: Message, field: FieldDescriptor) -> str:
    """The value of a field: strings as they are, all other types as JSON."""
    value = _plain(message)[field.name]
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _json(message: Message) -> str:
    return json.dumps(_plain(message), ensure_ascii=False)


def _plain(message: Message) -> Mapping[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else "`" + key.replace("`", "``") + "`"


def _port(request: container_pb2.PortRequest) -> str:
    protocol = "udp" if request.protocol == port_pb2.PORT_PROTOCOL_UDP else "tcp"
    return f"{request.container_port}/{protocol}"
