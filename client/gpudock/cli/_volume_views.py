"""Volumes as text for people."""

from __future__ import annotations

from collections.abc import Iterable

from gpudock._enums import enum_name
from gpudock.cli._text import age_text, bytes_text, fields, moment_text, table
from gpudock.v1.volume_pb2 import Volume, VolumeBackend, VolumeRevision, VolumeRevisionCause, VolumeState


def volumes(items: Iterable[Volume]) -> str:
    """One line for each."""
    return table(
        ("NAME", "STATE", "SIZE", "USED", "BACKEND", "CONTAINERS", "AGE", "NODE"),
        [
            (
                item.name,
                enum_name(VolumeState, item.state),
                _size(item.size_bytes),
                _used(item),
                _backend(item),
                ",".join(item.attached_containers) or "-",
                age_text(item.create_time),
                item.node,
            )
            for item in items
        ],
    )


def one_volume(item: Volume) -> str:
    """The table with this one line."""
    return volumes([item])


def volume(item: Volume) -> str:
    """All there is to say, a line for each thing."""
    return fields(
        (
            ("name", item.name),
            ("uid", item.uid),
            ("node", item.node),
            ("owner", item.owner),
            ("state", enum_name(VolumeState, item.state)),
            ("revision", str(item.revision)),
            ("size", _size(item.size_bytes)),
            ("used", _used(item)),
            ("backend", " ".join(filter(None, (_backend(item), item.filesystem)))),
            ("mountpoint", item.mountpoint),
            ("containers", ", ".join(item.attached_containers) or "none"),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(item.labels.items()))),
            ("operation", item.operation_id),
            ("created", moment_text(item.create_time)),
            ("changed", moment_text(item.update_time)),
            ("etag", item.etag),
        )
    )


def revisions(items: Iterable[VolumeRevision]) -> str:
    """One line for each."""
    return table(
        ("REVISION", "SIZE", "CAUSE", "AGE"),
        [
            (
                str(item.revision),
                _size(item.size_bytes),
                enum_name(VolumeRevisionCause, item.cause),
                age_text(item.create_time),
            )
            for item in items
        ],
    )


# The columns of a watch, with their widths.
WATCH_COLUMNS = {"NAME": 24, "STATE": 8, "SIZE": 10, "REVISION": 8, "CONTAINERS": 24, "OPERATION": 36}


def watch_cells(item: Volume) -> tuple[str, ...]:
    """What a watch shows of one, below WATCH_COLUMNS."""
    return (
        item.name,
        enum_name(VolumeState, item.state),
        _size(item.size_bytes),
        str(item.revision),
        ",".join(item.attached_containers) or "-",
        item.operation_id,
    )


def _size(number: int) -> str:
    return bytes_text(number) if number else "unlimited"


def _used(item: Volume) -> str:
    return bytes_text(item.used_bytes) if item.HasField("used_bytes") else "-"


def _backend(item: Volume) -> str:
    return enum_name(VolumeBackend, item.backend).lower().replace("_", "-")
