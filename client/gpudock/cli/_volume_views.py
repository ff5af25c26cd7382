"""Volumes and their revisions as text."""

from __future__ import annotations

from collections.abc import Iterable

from gpudock._enums import enum_name
from gpudock.cli._output import View, table_only
from gpudock.cli._tables import fields, table
from gpudock.cli._text import age_text, bytes_text, moment_text
from gpudock.v1.volume_pb2 import Volume, VolumeBackend, VolumeRevision, VolumeRevisionCause, VolumeState


def _volumes(items: Iterable[Volume]) -> str:
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
        wrap=("BACKEND", "CONTAINERS", "NODE"),
    )


def _volume_details(item: Volume) -> str:
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


def _revisions(items: Iterable[VolumeRevision]) -> str:
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


# The columns of a watch, with their widths in characters.
WATCH_COLUMNS = {"NAME": 24, "STATE": 8, "SIZE": 10, "REVISION": 8, "CONTAINERS": 24, "OPERATION": 36}


def watch_cells(item: Volume) -> tuple[str, ...]:
    """Return the cells of one line of a watch, in the order of WATCH_COLUMNS."""
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


VOLUME = View(lambda item: item.name, _volumes, _volume_details)
VOLUME_REVISION = table_only(lambda item: str(item.revision), _revisions)
