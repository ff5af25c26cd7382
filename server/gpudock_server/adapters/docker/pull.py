"""Fetching an image, with the bytes of all its layers as one progress."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Final

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.errors import EngineRejected, EngineUnavailable, ImagePullFailed
from gpudock_server.model.engine import RegistryAuth
from gpudock_server.ports import Progress

# The engine answers when the registry has: names to look up, redirects, a token to fetch.
_REGISTRY_TIMEOUT_FACTOR: Final = 4

_DOWNLOADING_STATUS = "Downloading"
# The engine counts down to its next try of a layer, or tells that a layer has to wait for others.
_WAITING_STATUSES = ("Retrying", "Waiting")
_DOWNLOADED_STATUSES = frozenset({"Verifying Checksum", "Download complete", "Extracting", "Pull complete"})


async def pull(connection: Connection, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
    """Fetch `reference`; leaving early makes the engine stop. Raises ImagePullFailed, EngineUnavailable.

    `progress` is called at every sign that the pull moves, also where no byte count changes. The engine itself waits
    for a silent registry without end.
    """
    call = "pull an image"
    name, tag = split_reference(reference)
    headers = {"X-Registry-Auth": auth_header(auth)} if auth else None
    layers, answered, timeout = PullProgress(), False, connection.timeout * _REGISTRY_TIMEOUT_FACTOR
    try:
        async with connection.stream(
            call, "POST", "images/create", params={"fromImage": name, "tag": tag}, headers=headers, timeout=timeout
        ) as response:
            answered = True
            async for document in connection.documents(call, response):
                # The answer was 200 long before this: a failure is one more document.
                if "error" in document or "errorDetail" in document:
                    raise ImagePullFailed(image=reference, detail=_failure(document))
                if layers.take(document):
                    progress(layers.current, layers.total)
    except EngineRejected as rejection:
        raise ImagePullFailed(image=reference, detail=rejection.detail) from rejection
    except EngineUnavailable as error:
        if answered:
            raise
        # The engine answers when the registry has. Raises EngineUnavailable where it is the engine that is away.
        await connection.ping()
        raise ImagePullFailed(image=reference, detail=f"the registry did not answer within {timeout:g} s") from error


def _failure(document: Mapping[str, Any]) -> str:
    detail = document.get("errorDetail") or {}
    return str(detail.get("message") or document.get("error") or "no reason given")


class PullProgress:
    """Sums what a pull says of each layer: bytes fetched and to fetch, in all the layers heard of so far.

    `current` never shrinks; `total` is 0 until the first size is known, and grows with every layer that starts.
    """

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}
        self._last_seen: dict[str, tuple[object, object]] = {}

    @property
    def current(self) -> int:
        """Bytes fetched."""
        return sum(current for current, _ in self._layers.values())

    @property
    def total(self) -> int:
        """Bytes to fetch, the fetched ones included."""
        return sum(total for _, total in self._layers.values())

    def take(self, document: Mapping[str, Any]) -> bool:
        """Count one document of the stream; whether it shows that the pull moves."""
        layer, status = str(document.get("id", "")), document.get("status")
        detail = document.get("progressDetail") or {}
        before, self._last_seen[layer] = self._last_seen.get(layer), (status, detail.get("current"))
        self._count(layer, status, detail)
        waits = str(status).startswith(_WAITING_STATUSES)
        return not waits and self._last_seen[layer] != before

    def _count(self, layer: str, status: object, detail: Mapping[str, Any]) -> None:
        current, total = self._layers.get(layer, (0, 0))
        if status == _DOWNLOADING_STATUS:
            # A layer whose fetch is begun again starts over; what was once counted stays counted.
            fetched = max(current, int(detail.get("current") or 0))
            self._layers[layer] = (fetched, max(fetched, total, int(detail.get("total") or 0)))
        elif status in _DOWNLOADED_STATUSES:
            # Extracting has a count of its own, of other bytes: for ours, the layer is here.
            self._layers[layer] = (total, total)


def split_reference(reference: str) -> tuple[str, str]:
    """An image's name, and its tag or digest. Without either it is `latest`: the engine would fetch every tag."""
    name, at, digest = reference.partition("@")
    if at:
        return name, digest
    head, colon, tag = name.rpartition(":")
    # "registry:5000/image" has a port there, not a tag.
    if colon and "/" not in tag:
        return head, tag
    return name, "latest"


def auth_header(auth: RegistryAuth) -> str:
    """Credentials as the engine takes them: URL-safe base64 of JSON."""
    if auth.identity_token:
        credentials = {"identitytoken": auth.identity_token}
    else:
        credentials = {"username": auth.username, "password": auth.password}
    if auth.server_address:
        credentials["serveraddress"] = auth.server_address
    return base64.urlsafe_b64encode(json.dumps(credentials).encode()).decode()
