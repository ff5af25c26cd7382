"""Images as they are made and shown."""

from __future__ import annotations

from datetime import datetime

from gpudock_server.model.record import Record


class CommittedImage(Record):
    """An image of a container's files, made because a user asked for it; `name` is `repository:tag`."""

    image_id: str
    name: str
    size_bytes: int
    container: str
    revision: int
    create_time: datetime
