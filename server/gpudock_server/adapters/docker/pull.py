"""Pulls an image and reports one progress for the bytes of all its layers."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Final

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.errors import EngineRejected, EngineUnavailable, ImagePullFailed
from gpudock_server.model.engine import RegistryAuth
from gpudock_server.model.image_reference import split_reference
from gpudock_server.ports import Progress

# The engine responds only after the registry has: DNS, redirects, a token request.
_REGISTRY_TIMEOUT_FACTOR: Final = 4

_DOWNLOADING_STATUS = "Downloading"
# The engine counts down to its next try of a layer, or reports that a layer waits for others.
_WAITING_STATUSES = ("Retrying", "Waiting")
_DOWNLOADED_STATUSES = frozenset({"Verifying Checksum", "Download complete", "Extracting", "Pull complete"})


async def pull(connection: Connection, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
    """Pull `reference`; cancelling stops the engine's pull. Raises ImagePullFailed, EngineUnavailable.

    `progress` is called at every sign of progress, also if no byte count changes. The engine waits for a silent
    registry without a timeout.
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
                # The status was 200 before the pull began: a failure is a document of the stream.
                if "error" in document or "errorDetail" in document:
                    raise ImagePullFailed(image=reference, detail=_failure(document))
                if layers.update(document):
                    progress(layers.current, layers.total)
    except EngineRejected as rejection:
        raise ImagePullFailed(image=reference, detail=rejection.detail) from rejection
    except EngineUnavailable as error:
        if answered:
            raise
        # Either the registry or the engine does not answer; the ping raises EngineUnavailable if it is the engine.
        await connection.ping()
        raise ImagePullFailed(image=reference, detail=f"the registry did not answer within {timeout:g} s") from error


def _failure(document: Mapping[str, Any]) -> str:
    detail = document.get("errorDetail") or {}
    return str(detail.get("message") or document.get("error") or "the registry gave no reason")


class PullProgress:
    """Adds up the progress of all layers of a pull that have been reported so far.

    `current` never shrinks; `total` is 0 until the first size is known, and grows with every layer that starts.
    """

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}
        self._last_reports: dict[str, tuple[object, object]] = {}

    @property
    def current(self) -> int:
        """Bytes downloaded."""
        return sum(current for current, _ in self._layers.values())

    @property
    def total(self) -> int:
        """Bytes to download, including the downloaded ones."""
        return sum(total for _, total in self._layers.values())

    def update(self, document: Mapping[str, Any]) -> bool:
        """Add one document of the stream; returns whether it shows progress."""
        layer, status = str(document.get("id", "")), document.get("status")
        detail = document.get("progressDetail") or {}
        before, self._last_reports[layer] = self._last_reports.get(layer), (status, detail.get("current"))
        self._count(layer, status, detail)
        waits = str(status).startswith(_WAITING_STATUSES)
        return not waits and self._last_reports[layer] != before

    def _count(self, layer: str, status: object, detail: Mapping[str, Any]) -> None:
        current, total = self._layers.get(layer, (0, 0))
        if status == _DOWNLOADING_STATUS:
            # A restarted download counts from 0 again; the highest count is kept.
            downloaded = max(current, int(detail.get("current") or 0))
            self._layers[layer] = (downloaded, max(downloaded, total, int(detail.get("total") or 0)))
        elif status in _DOWNLOADED_STATUSES:
            # While extracting, the engine counts other bytes; the download is complete.
            self._layers[layer] = (total, total)


def auth_header(auth: RegistryAuth) -> str:
    """Credentials in the engine's format: URL-safe base64 of JSON."""
    if auth.identity_token:
        credentials = {"identitytoken": auth.identity_token}
    else:
        credentials = {"username": auth.username, "password": auth.password}
    if auth.server_address:
        credentials["serveraddress"] = auth.server_address
    return base64.urlsafe_b64encode(json.dumps(credentials).encode()).decode()
