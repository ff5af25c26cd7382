"""What happens to our containers, as the engine tells it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.errors import EngineUnavailable
from gpudock_server.model.engine import LABEL_UID, RESERVED_LABEL_PREFIX, EngineEvent, EngineEventKind

_CALL = "tell its events"
_NANO = 1_000_000_000
_KINDS = {kind.value: kind for kind in EngineEventKind}


async def events(connection: Connection, since_nanos: int) -> AsyncIterator[EngineEvent]:
    """Events of containers that carry our label, those at `since_nanos` included; 0 is from now on.

    Never ends but by EngineUnavailable. The engine remembers its last 256 events, and none of before its restart.
    """
    filters = {"type": ["container"], "label": [LABEL_UID], "event": list(_KINDS)}
    params = {"filters": json.dumps(filters)}
    if since_nanos > 0:
        params["since"] = f"{since_nanos // _NANO}.{since_nanos % _NANO:09}"
    async with connection.stream(_CALL, "GET", "events", params=params) as response:
        async for document in connection.documents(_CALL, response):
            if (event := engine_event(document)) is not None:
                yield event
    raise EngineUnavailable(call=_CALL, detail="the stream of events ended")


def engine_event(document: Mapping[str, Any]) -> EngineEvent | None:
    """One event, or None where it is of a kind that changes nothing for us."""
    # "health_status: healthy" and its like: the kind stands before the colon.
    kind = _KINDS.get(str(document.get("Action", "")).partition(":")[0])
    actor = document.get("Actor") or {}
    if kind is None or not actor.get("ID"):
        return None
    # The engine mixes words of its own (name, image, exitCode) into the labels; ours alone cannot be mistaken.
    attributes: Mapping[str, str] = actor.get("Attributes") or {}
    labels = {name: value for name, value in attributes.items() if name.startswith(RESERVED_LABEL_PREFIX)}
    return EngineEvent(kind=kind, engine_id=actor["ID"], labels=labels, time_nanos=int(document.get("timeNano") or 0))
