"""Blocking HTTP/1.1 over a unix socket, for readiness checks and setting up the engine without an event loop."""

import http.client
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode

from typing_extensions import override

from .errors import RigError
from .patience import limit

_TIMEOUT_S = 60.0


class HttpStatusError(RigError):
    """The server answered with a status of 400 or above."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class _UnixConnection(http.client.HTTPConnection):
    """A connection to the server that listens on the unix socket `path`."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=limit(timeout_s))
        self._path = path

    @override
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def call(
    socket_path: Path,
    method: str,
    path: str,
    *,
    query: Mapping[str, str | Sequence[str]] | None = None,
    send: object = None,
    body: BinaryIO | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> Any:
    """Make one request on a new connection.

    Args:
        socket_path: the socket that the server listens on.
        method: GET, POST, ...
        path: the absolute path, without the query.
        query: the parameters; a sequence repeats its parameter.
        send: a value to send as JSON.
        body: sent as it is, chunked.
        timeout_s: for each wait on the socket, on an idle machine.

    Returns:
        The JSON of the answer, None for an empty answer, or the bytes of any other.

    Raises:
        HttpStatusError: the status is 400 or above.
        OSError: the server cannot be reached.
    """
    connection = _UnixConnection(socket_path, timeout_s)
    try:
        target = f"{path}?{urlencode(query, doseq=True)}" if query else path
        headers = {"Content-Type": "application/x-tar" if body else "application/json"}
        data = body or (None if send is None else json.dumps(send).encode())
        connection.request(method, target, body=data, headers=headers)
        response = connection.getresponse()
        content = response.read()
        answer: Any = content or None
        if "json" in (response.getheader("Content-Type") or "") and content:
            # A progress stream is JSON lines; the last line has the outcome.
            answer = json.loads(content) if content.count(b"\n") <= 1 else json.loads(content.splitlines()[-1])
        if response.status >= http.client.BAD_REQUEST:
            message = answer.get("message", "") if isinstance(answer, dict) else str(answer)
            raise HttpStatusError(response.status, message)
        return answer
    finally:
        connection.close()
