"""Changes of a spec by UpdateContainer and CloneContainer: fields, parts of fields, entries of maps and lists.

`spec_change` checks what can be checked without the current spec of the container. The `SpecChangeRequest` that it
returns is applied to the current spec when the operation is planned, and the result is checked then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message
from gpudock.v1 import container_pb2, container_service_pb2, port_pb2

from gpudock_server.errors import InvalidArgument
from gpudock_server.model.engine import HostCapacity
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.rpc.containers.mount_requests import mounts
from gpudock_server.rpc.containers.spec_messages import spec_message
from gpudock_server.rpc.containers.spec_requests import PROTOCOL_OF, labels, ports, spec
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations

Request: TypeAlias = container_service_pb2.UpdateContainerRequest | container_service_pb2.CloneContainerRequest
K = TypeVar("K")
E = TypeVar("E")

SPEC_FIELDS = tuple(field.name for field in container_pb2.ContainerSpec.DESCRIPTOR.fields)
_MAPS = ("env", "labels")

_ANY_IMAGE = "image"
_PACKAGE = container_pb2.DESCRIPTOR.package
# Field of the spec -> the fields of ContainerSpecEdits that add and remove its entries.
_EDITS = {
    "env": ("set_env", "remove_env"),
    "labels": ("set_labels", "remove_labels"),
    "mounts": ("add_mounts", "remove_mounts"),
    "ports": ("add_ports", "remove_ports"),
}
# A key without backquotes in a path. AIP-161 asks for backquotes around all but letters, digits and `_`; only these two
# characters are ambiguous without them.
_BARE_KEY = re.compile(r"[^.`]+")
_QUOTED_KEY = re.compile(r"`((?:[^`]|``)+)`")
# A mask may have a million paths; an error names only the first few.
_PATHS_NAMED = 5
_PATH_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class _Path:
    """A path of the mask: a field of the spec and, for a part of it, the key of a map or the field of a message."""

    field: str
    part: str = ""


@dataclass(frozen=True)
class SpecChangeRequest:
    """A change of a spec. `fields` are the fields of the spec that it may change."""

    fields: frozenset[str]
    requested: container_pb2.ContainerSpec
    paths: tuple[_Path, ...]
    edits: container_service_pb2.ContainerSpecEdits
    host: HostCapacity

    def apply(self, before: ContainerSpec) -> ContainerSpec:
        """The changed spec. Raises InvalidArgument if a changed field breaks a rule."""
        merged = spec_message(before)
        for path in self.paths:
            _merge(merged, self.requested, path)
        _edit(merged, self.edits)
        violations = Violations()
        after = spec(violations.at("spec"), merged, self.host)
        found = tuple(violation for violation in violations.found if self._can_change(violation.field))
        if found:
            raise InvalidArgument(found)
        # Unchanged fields are kept as they are, even if they break a rule that is newer than the spec.
        return before.changed(**{field: getattr(after, field) for field in sorted(self.fields)})

    def _can_change(self, path: str) -> bool:
        field = re.split(r"[.\[]", path.removeprefix("spec").removeprefix("."), maxsplit=1)[0]
        # A violation without a field is about the size of the whole spec. Entrypoint and command share a limit, whose
        # violation is reported for the command.
        return not field or field in self.fields or (field == "command" and "entrypoint" in self.fields)


def spec_change(
    violations: Violations, request: Request, known: Sequence[str], host: HostCapacity
) -> SpecChangeRequest:
    """Check the change of a spec in a request. `known` are the fields that it may change."""
    paths = _paths(violations, request, known)
    _check_values(violations.at("spec"), request.spec, paths, host)
    masked = frozenset(path.field for path in paths)
    _check_edits(violations.at("edits"), request.edits, masked, host)
    edited = {field for field in _EDITS if _edited(request.edits, field)}
    return SpecChangeRequest(
        fields=masked | edited, requested=request.spec, paths=paths, edits=request.edits, host=host
    )


def _paths(violations: Violations, request: Request, known: Sequence[str]) -> tuple[_Path, ...]:
    mask = dict.fromkeys(request.update_mask.paths)
    if not mask:
        return tuple(_Path(field.name) for field, _ in request.spec.ListFields() if field.name in known)
    if [*mask] == ["*"]:
        return tuple(map(_Path, known))
    found, wrong = [], []
    for text in mask:
        try:
            found.append(_path(text, known))
        except ValueError as error:
            wrong.append(f"{text[:_PATH_CHARACTERS]!r}: {error}")
    if wrong:
        violations.add("update_mask", "; ".join(wrong[:_PATHS_NAMED]))
    return tuple(found)


def _path(text: str, known: Sequence[str]) -> _Path:
    """Parse a path of the mask. Raises ValueError that says what is wrong."""
    name, dot, rest = text.removeprefix("spec.").partition(".")
    if name not in known:
        raise ValueError(f"unknown field; use one of {', '.join(known)}, or `*`")
    if not dot:
        return _Path(name)
    if name in _MAPS:
        return _Path(name, _key(rest))
    parts = _parts(name)
    if not parts:
        more = f"; change its entries with `edits.{_EDITS[name][0]}`" if name in _EDITS else ""
        raise ValueError(f"{name} can only be replaced as a whole{more}")
    if rest not in parts:
        raise ValueError(f"unknown part of {name}; use one of {', '.join(parts)}")
    return _Path(name, rest)


def _key(text: str) -> str:
    if quoted := _QUOTED_KEY.fullmatch(text):
        return quoted[1].replace("``", "`")
    if not _BARE_KEY.fullmatch(text):
        raise ValueError("put a key with dots or backquotes between backquotes, as in labels.`example.com/team`")
    return text


def _parts(field: str) -> Sequence[str]:
    """The parts of a field that can be changed alone: those of a message of this API; empty for other fields."""
    value = getattr(container_pb2.ContainerSpec(), field)
    if not isinstance(value, Message) or value.DESCRIPTOR.file.package != _PACKAGE:
        return ()
    return tuple(value.DESCRIPTOR.fields_by_name)


def _check_values(
    violations: Violations, requested: container_pb2.ContainerSpec, paths: Iterable[_Path], host: HostCapacity
) -> None:
    """Check the new values without the current spec."""
    partial = container_pb2.ContainerSpec(image=_ANY_IMAGE)
    for path in paths:
        _merge(partial, requested, path)
        if path == _Path("restart_policy", "max_retry_count"):
            # The policy is not known yet; `apply` checks that it takes a count.
            partial.restart_policy.policy = container_pb2.RESTART_POLICY_KIND_ON_FAILURE
    spec(violations, partial, host)


def _check_edits(
    violations: Violations,
    edits: container_service_pb2.ContainerSpecEdits,
    masked: frozenset[str],
    host: HostCapacity,
) -> None:
    fields.environment(violations, "set_env", edits.set_env)
    labels(violations, edits.set_labels, "set_labels")
    mounts(violations, edits.add_mounts, host, "add_mounts")
    ports(violations, edits.add_ports, "add_ports")
    for index, target in enumerate(edits.remove_mounts):
        if not target.startswith("/"):
            violations.add("remove_mounts", "must be the target of a mount, an absolute path", index)
    for index, port in enumerate(edits.remove_ports):
        port_violations = violations.at("remove_ports", index)
        fields.in_range(port_violations, "container_port", port.container_port, 1, fields.MAX_PORT)
        if port.protocol and port.protocol not in PROTOCOL_OF:
            port_violations.add("protocol", f"is {port.protocol}; must be one of 0, {', '.join(map(str, PROTOCOL_OF))}")
    _check_contradictions(violations, edits)
    for field, (adds, removes) in _EDITS.items():
        if field in masked and _edited(edits, field):
            edit = adds if getattr(edits, adds) else removes
            violations.add(edit, f"{field} is also changed by `spec` and `update_mask`; use only one of them")


def _check_contradictions(violations: Violations, edits: container_service_pb2.ContainerSpecEdits) -> None:
    added: Mapping[str, set[Any]] = {
        "remove_env": set(edits.set_env),
        "remove_labels": set(edits.set_labels),
        "remove_mounts": {mount.target for mount in edits.add_mounts},
        "remove_ports": set(map(_port_key, edits.add_ports)),
    }
    for field, keys in added.items():
        for index, value in enumerate(getattr(edits, field)):
            if (_port_key(value) if field == "remove_ports" else value) in keys:
                violations.add(field, "is both added and removed", index)


def _edited(edits: container_service_pb2.ContainerSpecEdits, field: str) -> bool:
    return any(getattr(edits, name) for name in _EDITS[field])


def _merge(into: container_pb2.ContainerSpec, source: container_pb2.ContainerSpec, path: _Path) -> None:
    """Copy what `path` names from `source`; if it is unset there, unset it."""
    if path.part and path.field in _MAPS:
        entries, given = getattr(into, path.field), getattr(source, path.field)
        entries.pop(path.part, None)
        if path.part in given:
            entries[path.part] = given[path.part]
    elif path.part:
        part: Message = getattr(into, path.field)
        part.SetInParent()
        _copy(part, getattr(source, path.field), path.part)
    else:
        _copy(into, source, path.field)


def _copy(into: Message, source: Message, name: str) -> None:
    """Copy one field from `source`; if it is unset there, unset it."""
    into.ClearField(name)
    for field, value in source.ListFields():
        if field.name == name:
            into.MergeFrom(type(source)(**{name: value}))


def _edit(merged: container_pb2.ContainerSpec, edits: container_service_pb2.ContainerSpecEdits) -> None:
    for entries, added, removed in (
        (merged.env, edits.set_env, edits.remove_env),
        (merged.labels, edits.set_labels, edits.remove_labels),
    ):
        for key in removed:
            entries.pop(key, None)
        entries.update(added)
    lists = container_pb2.ContainerSpec(
        mounts=_edited_list(
            {mount.target: mount for mount in merged.mounts},
            {mount.target: mount for mount in edits.add_mounts},
            edits.remove_mounts,
        ),
        ports=_edited_list(
            {_port_key(port): port for port in merged.ports},
            {_port_key(port): port for port in edits.add_ports},
            map(_port_key, edits.remove_ports),
        ),
    )
    merged.ClearField("mounts")
    merged.ClearField("ports")
    merged.MergeFrom(lists)


def _edited_list(present: dict[K, E], added: dict[K, E], removed: Iterable[K]) -> list[E]:
    """The remaining entries in their order, then the added ones."""
    for key in removed:
        present.pop(key, None)
    return [*(present | added).values()]


def _port_key(port: container_pb2.PortRequest | container_service_pb2.ContainerPort) -> tuple[int, int]:
    return port.container_port, port.protocol or port_pb2.PORT_PROTOCOL_TCP
