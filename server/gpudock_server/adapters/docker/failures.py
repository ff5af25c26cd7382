"""The one place where what goes wrong between us and the engine becomes a domain error."""

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

# What aiodocker itself puts in place of an HTTP status when it could not connect.
_CONNECT_FAILED_STATUS = 900
# What a proxy answers when the engine behind it is gone.
_GATEWAY_STATUSES = frozenset({502, 504})
# What an engine answers, with status 500, when its own containerd does not: nobody knows what was done.
_CONTAINERD_UNAVAILABLE = re.compile(
    r"containerd\.sock|transport is closing|error reading from server|connection error: desc|"
    r"code = Unavailable|: unavailable$|ttrpc: closed|context canceled"
)

_PORT_IN_USE = re.compile(r"port is already allocated|address already in use")
# An address and a port as messages write them: after 0.0.0.0, [::] or a bare :: comes the colon.
_ADDRESS = re.compile(r"(?:\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-fA-F:]*\]|::):(?P<port>\d{1,5})(?!\d)")
_TRANSPORT = re.compile(r"\b(?P<protocol>tcp|udp)[46]?\b")
_FOREIGN_HOLDER = "a process outside gpudock"


@contextmanager
def engine_errors(call: str) -> Iterator[None]:
    """Raise EngineRejected for an answer that says no, and EngineUnavailable for every way of not answering.

    `call` completes the sentence "the engine refused to ...". A cancellation passes untouched.
    """
    try:
        yield
    except DockerError as error:
        raise _engine_error(call, error) from error
    except TimeoutError as error:
        raise EngineUnavailable(call=call, detail=str(error) or "no answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        raise EngineUnavailable(call=call, detail=str(error) or type(error).__name__) from error
    except (ValueError, KeyError, TypeError) as error:
        # Not JSON, or not the JSON of this API: whatever listens there, it is not an engine that we can use.
        raise EngineUnavailable(call=call, detail=f"an answer that makes no sense: {error!r}") from error


def _engine_error(call: str, error: DockerError) -> GpudockError:
    # Of a failed connection aiodocker's own message names only the URL, which on a unix socket is made up.
    told = error.__context__ if error.status == _CONNECT_FAILED_STATUS else None
    detail = str(told or error.message).strip()
    if (
        error.status == _CONNECT_FAILED_STATUS
        or error.status in _GATEWAY_STATUSES
        or _CONTAINERD_UNAVAILABLE.search(detail)
    ):
        return EngineUnavailable(call=call, detail=detail)
    return EngineRejected(call=call, status=error.status, detail=detail)


def start_failure(rejection: EngineRejected, container: Mapping[str, Any]) -> GpudockError:
    """Why a container did not start: a port that is taken, or its process, devices and mounts (StartFailed).

    `container` is its inspect JSON, empty when it could not be read.
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
    """Transport of a taken port: some messages name it, for others the container's own bindings tell."""
    if named := _TRANSPORT.search(message):
        return named["protocol"]
    bindings: Mapping[str, Any] = (container.get("HostConfig") or {}).get("PortBindings") or {}
    for key, hosts in bindings.items():
        if any(host.get("HostPort") == str(port) for host in hosts or ()):
            return key.rpartition("/")[2]
    return "tcp"
