"""Translates failed engine calls to domain errors; the only file that reads messages of Docker, containerd and runc."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiodocker import DockerError

from gpudock_server.errors import EngineRejected, EngineUnavailable, GpudockError, PortInUse, StartFailed
from gpudock_server.model.engine import LABEL_NAME

NOT_FOUND = 404
CONFLICT = 409
BAD_REQUEST = 400

# aiodocker's substitute for an HTTP status when it could not connect.
_CONNECT_FAILED_STATUS = 900
# A proxy's answer when the engine behind it is down.
_GATEWAY_STATUSES = frozenset({502, 504})
# With status 500: the engine could not reach its containerd, so what was done is unknown.
_CONTAINERD_UNAVAILABLE = re.compile(
    r"containerd\.sock|transport is closing|error reading from server|connection error: desc|"
    r"code = Unavailable|: unavailable$|ttrpc: closed|context canceled"
)

_PORT_IN_USE = re.compile(r"port is already allocated|address already in use")
# An address and a port as in messages: 0.0.0.0:80, [::]:80 or :::80.
_ADDRESS = re.compile(r"(?:\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-fA-F:]*\]|::):(?P<port>\d{1,5})(?!\d)")
_TRANSPORT = re.compile(r"\b(?P<protocol>tcp|udp)[46]?\b")
_FOREIGN_HOLDER = "a process outside gpudock"

# On cgroup v1 runc gives up freezing, and thaws, if the processes of a busy host do not freeze in time (its
# libcontainer/cgroups/fs/freezer.go); a moment later they do.
_FREEZE_TIMEOUT = "unable to freeze"
_NAME_IN_USE = "already exists"
_PROGRAM_NOT_FOUND = re.compile(
    r"executable file (?:`.*` )?not found|exec: \".*\": (?:stat .*: )?no such file or directory", re.DOTALL
)


@contextmanager
def engine_errors(call: str) -> Iterator[None]:
    """Raise EngineRejected for an error response, and EngineUnavailable for a missing or unusable response.

    `call` completes "the engine refused to ...". A cancellation passes unchanged.
    """
    try:
        yield
    except DockerError as error:
        raise _engine_error(call, error) from error
    except TimeoutError as error:
        raise EngineUnavailable(call=call, detail=str(error) or "timed out") from error
    except (aiohttp.ClientError, OSError) as error:
        raise EngineUnavailable(call=call, detail=str(error) or type(error).__name__) from error
    except (ValueError, KeyError, TypeError) as error:
        # Not JSON, or not the JSON of this API: what listens there is not an engine.
        raise EngineUnavailable(call=call, detail=f"unexpected response: {error!r}") from error


def _engine_error(call: str, error: DockerError) -> GpudockError:
    # aiodocker's message for a failed connection has only the URL, which for a unix socket is a placeholder.
    cause = error.__context__ if error.status == _CONNECT_FAILED_STATUS else None
    detail = str(cause or error.message).strip()
    if (
        error.status == _CONNECT_FAILED_STATUS
        or error.status in _GATEWAY_STATUSES
        or _CONTAINERD_UNAVAILABLE.search(detail)
    ):
        return EngineUnavailable(call=call, detail=detail)
    return EngineRejected(call=call, status=error.status, detail=detail)


def is_freeze_timeout(error: Exception) -> bool:
    """Whether a pause or unpause failed because processes did not freeze in time; another try may succeed."""
    return isinstance(error, EngineRejected) and _FREEZE_TIMEOUT in error.detail


def is_name_conflict(rejection: EngineRejected) -> bool:
    """Whether the engine refused to create something because its name is in use."""
    return rejection.status == CONFLICT or _NAME_IN_USE in rejection.detail


def is_program_missing(start_error: str) -> bool:
    """Whether a program could not be started because it does not exist."""
    return _PROGRAM_NOT_FOUND.search(start_error) is not None


def start_failure(rejection: EngineRejected, container: Mapping[str, Any]) -> GpudockError:
    """Why a container did not start: PortInUse, or StartFailed (its process, devices or mounts).

    `container` is its inspect JSON, empty if it could not be read.
    """
    message = rejection.detail
    if _PORT_IN_USE.search(message):
        address = _ADDRESS.search(message)
        port = int(address["port"]) if address else 0
        return PortInUse(host_port=port, protocol=_protocol(message, port, container), holder=_FOREIGN_HOLDER)
    labels = (container.get("Config") or {}).get("Labels") or {}
    name = labels.get(LABEL_NAME) or container.get("Name", "").lstrip("/") or container.get("Id", "")
    return StartFailed(container=name, detail=message)


def _protocol(message: str, port: int, container: Mapping[str, Any]) -> str:
    """The protocol of a port in use, from the message or else from the container's port bindings."""
    if named := _TRANSPORT.search(message):
        return named["protocol"]
    bindings: Mapping[str, Any] = (container.get("HostConfig") or {}).get("PortBindings") or {}
    for key, hosts in bindings.items():
        if any(host.get("HostPort") == str(port) for host in hosts or ()):
            return key.rpartition("/")[2]
    return "tcp"
