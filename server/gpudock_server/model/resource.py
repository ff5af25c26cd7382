"""References to the objects that operations change."""

from __future__ import annotations

from enum import StrEnum

from gpudock_server.model.record import Record


class ResourceKind(StrEnum):
    """A kind of object with a name, a current record and a lock."""

    CONTAINER = "container"
    VOLUME = "volume"


class ResourceRef(Record):
    """Identifies one object. A name can be used again after its object was deleted; a `uid` cannot."""

    kind: ResourceKind
    name: str
    uid: str
