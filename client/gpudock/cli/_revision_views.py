"""The revisions of a container as text."""

from __future__ import annotations

from collections.abc import Iterable

from gpudock._enums import enum_name
from gpudock.cli._output import View
from gpudock.cli._spec_views import spec_rows
from gpudock.cli._tables import fields, table
from gpudock.cli._text import age_text, bytes_text, moment_text
from gpudock.cli._views import binding
from gpudock.v1.container_revision_pb2 import ContainerRevision, RevisionCause, SnapshotKind


def _revisions(items: Iterable[ContainerRevision]) -> str:
    return table(
        ("REVISION", "CAUSE", "GPUS", "IMAGE", "SIZE", "SNAPSHOT", "AGE"),
        [
            (
                f"{item.revision}{' *' if item.current else ''}",
                enum_name(RevisionCause, item.cause),
                str(len(item.gpu_uuids)),
                item.spec.image,
                bytes_text(item.layer_bytes) if item.layer_bytes else "-",
                _snapshot(item),
                age_text(item.create_time),
            )
            for item in items
        ],
        wrap=("CAUSE", "IMAGE"),
    )


def _revision_details(item: ContainerRevision) -> str:
    snapshot = item.snapshot
    return fields(
        (
            ("container", item.container),
            ("uid", item.uid),
            ("revision", f"{item.revision}{' (current)' if item.current else ''}"),
            ("cause", enum_name(RevisionCause, item.cause)),
            *spec_rows(item.spec),
            ("image id", item.image_id),
            ("GPUs", ", ".join(item.gpu_uuids) or "none"),
            ("ports", ", ".join(map(binding, item.ports))),
            ("files", bytes_text(item.layer_bytes) if item.layer_bytes else ""),
            ("files not kept", item.snapshot_warning),
            ("snapshot", _snapshot(item)),
            ("on the disk", f"{bytes_text(snapshot.new_bytes)} that no other one has" if snapshot.new_bytes else ""),
            ("created", moment_text(item.create_time)),
            ("operation", item.operation_id),
        )
    )


def _snapshot(item: ContainerRevision) -> str:
    """Return how the files of a revision are kept; `-` for the current one, whose files are the container's."""
    return enum_name(SnapshotKind, item.snapshot.kind).lower() if item.HasField("snapshot") else "-"


REVISION = View(lambda item: str(item.revision), _revisions, _revision_details)
