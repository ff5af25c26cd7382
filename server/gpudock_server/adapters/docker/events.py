"""The engine's event stream for gpudock's containers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.adapters.docker.translate import NANOS_PER_SECOND
from gpudock_server.errors import EngineUnavailable
from gpudock_server.model.engine import LABEL_UID, RESERVED_LABEL_PREFIX, EngineEvent, EngineEventKind

EVENTS_CALL = "stream its events"
_KINDS = {kind.value: kind for kind in EngineEventKind}


async def events(connection: Connection, since_nanos: int) -> AsyncIterator[EngineEvent]:
    """Events of containers with the label LABEL_UID, from `since_nanos` (inclusive) on; 0 means from now on.

    Ends only with EngineUnavailable. The engine keeps its last 256 events, and none from before its last start.
    """
    filters = {"type": ["container"], "label": [LABEL_UID], "event": list(_KINDS)}
    params = {"filters": json.dumps(filters)}
    if since_nanos > 0:
        params["since"] = f"{since_nanos // NANOS_PER_SECOND}.{since_nanos % NANOS_PER_SECOND:09}"
    async with connection.stream(EVENTS_CALL, "GET", "events", params=params) as response:
        async for document in connection.documents(EVENTS_CALL, response):
            if (event := engine_event(document)) is not None:
                yield event
    raise EngineUnavailable(call=EVENTS_CALL, detail="the event stream ended")


def engine_event(document: Mapping[str, Any]) -> EngineEvent | None:
    """Reads one event of the stream; None if its kind is not in EngineEventKind."""
    # In "health_status: healthy" the kind is before the colon.
    kind = _KINDS.get(str(document.get("Action", "")).partition(":")[0])
    actor = document.get("Actor") or {}
    if kind is None or not actor.get("ID"):
        return None
    # The engine adds attributes of its own (name, image, exitCode) to the labels; only gpudock's prefix is unambiguous.
    attributes: Mapping[str, str] = actor.get("Attributes") or {}
    labels = {name: value for name, value in attributes.items() if name.startswith(RESERVED_LABEL_PREFIX)}
    return EngineEvent(kind=kind, engine_id=actor["ID"], labels=labels, time_nanos=int(document.get("timeNano") or 0))
