"""The client of one daemon, over one channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from gpudock._calls import Calls
from gpudock._channel import Endpoint
from gpudock._containers import Containers
from gpudock._nodes import Nodes
from gpudock._operations import Operations
from gpudock._volumes import Volumes
from gpudock.errors import Unavailable


class Client:
    """A client of one gpudockd. Create it inside a running event loop and close it after use, or use `async with`.

    Calls that fail with UNAVAILABLE are retried for `retry_for` seconds. A mutation keeps its `request_id`, so that the
    server makes it only once. Any other failure raises a `GpudockError`.
    """

    def __init__(
        self,
        target: str = "",
        *,
        token: str = "",
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
        tls: bool = False,
        timeout: float = 30.0,
        retry_for: float = 15.0,
        reattach_for: float = 60.0,
    ) -> None:
        """Create the client; it connects on first use.

        Args:
            target: `unix:/path`, a path, or `host:port`; empty means $GPUDOCK_ADDRESS, else the socket
                `/run/gpudock/gpudock.sock`.
            token: sent with each call; empty means the content of the file that $GPUDOCK_TOKEN_FILE names, if set.
            ca: PEM file with the roots to trust instead of the system's. Implies `tls`.
            cert: PEM file with the client's certificate chain, with `key`. Implies `tls`.
            key: PEM file with the private key of `cert`.
            tls: whether to use TLS.
            timeout: deadline in seconds of one attempt of a call that changes nothing. Mutations have no deadline.
            retry_for: seconds during which a call is retried after UNAVAILABLE; for the stream of an operation or a
                watch, until its first response.
            reattach_for: seconds during which the stream of an operation or a watch is reopened after its connection
                broke.

        Raises:
            ValueError: the token would be sent unencrypted.
            OSError: a file cannot be read.
        """
        endpoint = Endpoint(address=target, token=token, ca=ca, cert=cert, key=key, tls=tls)
        calls = Calls(endpoint.metadata(), timeout, retry_for, reattach_for)
        self._channel = endpoint.open()
        self.target: str = endpoint.target
        """The address of the daemon, in the syntax of gRPC."""
        self.operations: Operations = Operations(calls, self._channel)
        self.containers: Containers = Containers(calls, self._channel, self.operations)
        self.volumes: Volumes = Volumes(calls, self._channel, self.operations)
        self.node: Nodes = Nodes(calls, self._channel)

    async def ready(self, timeout: float = 5.0) -> None:
        """Connect; raises Unavailable if the daemon does not answer within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._channel.channel_ready()
        except TimeoutError:
            raise Unavailable(f"gpudockd does not answer at {self.target}", code=grpc.StatusCode.UNAVAILABLE) from None

    async def close(self) -> None:
        """Cancel all calls and close the connection. Operations continue on the server."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@asynccontextmanager
async def connect(
    target: str = "",
    *,
    token: str = "",
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    tls: bool = False,
    timeout: float = 5.0,
) -> AsyncIterator[Client]:
    """Return a connected client: `async with gpudock.connect() as client`. The arguments are those of `Client`.

    Raises Unavailable if the daemon does not answer within `timeout` seconds.
    """
    async with Client(target, token=token, ca=ca, cert=cert, key=key, tls=tls) as client:
        await client.ready(timeout)
        yield client
