"""Image references, credentials and progress of pulls."""

from __future__ import annotations

import base64
import json

import pytest
from gpudock_server.adapters.docker.pull import PullProgress, auth_header
from gpudock_server.model.engine import (
    RegistryAuth,
)
from gpudock_server.model.image_reference import split_reference


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("busybox", ("busybox", "latest")),
        ("busybox:1", ("busybox", "1")),
        ("host:5000/a/b", ("host:5000/a/b", "latest")),
        ("host:5000/a/b:c", ("host:5000/a/b", "c")),
        ("a@sha256:00", ("a", "sha256:00")),
    ],
)
def test_references_are_split_into_repository_and_tag(reference: str, parts: tuple[str, str]) -> None:
    assert split_reference(reference) == parts


def test_credentials_are_encoded_for_the_registry_header() -> None:
    plain = RegistryAuth(username="ü", password="p?>")  # noqa: S106 - no real credentials
    decoded = json.loads(base64.urlsafe_b64decode(auth_header(plain)))
    assert decoded == {"username": "ü", "password": "p?>"}
    by_token = RegistryAuth(identity_token="t", server_address="r")  # noqa: S106 - no real credentials
    token = json.loads(base64.urlsafe_b64decode(auth_header(by_token)))
    assert token == {"identitytoken": "t", "serveraddress": "r"}


def test_the_progress_of_layers_is_added() -> None:
    layers = PullProgress()

    def update(layer: str, status: str, current: int = 0, total: int = 0) -> tuple[bool, int, int]:
        detail = {"current": current, "total": total} if total else {}
        changed = layers.update({"id": layer, "status": status, "progressDetail": detail})
        return changed, layers.current, layers.total

    assert update("", "Pulling from x") == (True, 0, 0)
    assert update("a", "Pulling fs layer") == (True, 0, 0)
    # Countdowns and repeated messages are no progress.
    assert update("a", "Waiting") == (False, 0, 0)
    assert update("a", "Retrying in 5 seconds") == (False, 0, 0)
    assert update("a", "Retrying in 4 seconds") == (False, 0, 0)
    assert update("a", "Downloading", 10, 100) == (True, 10, 100)
    assert update("a", "Downloading", 10, 100) == (False, 10, 100)
    assert update("b", "Downloading", 5, 50) == (True, 15, 150)
    assert update("a", "Downloading", 3, 100) == (True, 15, 150)
    assert update("a", "Download complete") == (True, 105, 150)
    assert update("a", "Extracting", 1, 100) == (True, 105, 150)
    assert update("b", "Pull complete") == (True, 150, 150)
    assert update("c", "Already exists") == (True, 150, 150)
