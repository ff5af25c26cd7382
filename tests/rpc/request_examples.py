"""Requests that are valid except for the fields that a test sets, and their violations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message
from gpudock.v1 import (
    container_pb2,
    container_service_pb2,
)
from gpudock_server.errors import InvalidArgument

UUID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
DAY = 86_400
SECRET = "s"  # noqa: S105 - a test secret


def violations_of(validate: Callable[[Any], object], request: Message) -> dict[str, str]:
    """Return the description of each violation by field."""
    with pytest.raises(InvalidArgument) as caught:
        validate(request)
    return {violation.field: violation.description for violation in caught.value.violations}


def create_request(**fields: Any) -> container_service_pb2.CreateContainerRequest:
    """Return a request whose spec is valid except for `fields`."""
    return container_service_pb2.CreateContainerRequest(
        name="train", spec=container_pb2.ContainerSpec(**{"image": "busybox", **fields})
    )


def mount(**fields: Any) -> container_pb2.Mount:
    """Return a mount that is valid except for `fields`."""
    return container_pb2.Mount(**{"volume": "data", "target": "/data", **fields})


def port(container_port: int = 80, host_port: int = 0, protocol: int = 0) -> container_pb2.PortRequest:
    """Return a request for a port."""
    return container_pb2.PortRequest(
        container_port=container_port,
        host_port=host_port,
        protocol=protocol,  # type: ignore[arg-type]  # also values outside the enum
    )
