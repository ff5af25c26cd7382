"""What an operation works on: an object with a name, of some kind."""

from __future__ import annotations

from enum import StrEnum

from gpudock_server.model.record import Record


class ResourceKind(StrEnum):
    """A kind of object that has a name, a head and a lock."""

    CONTAINER = "container"
    VOLUME = "volume"


class ResourceRef(Record):
    """Names one object. Names come again when an object was deleted; its `uid` does not."""

    kind: ResourceKind
    name: str
    uid: str
