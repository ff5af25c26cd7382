"""The client: one channel to one daemon."""

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
    """A client of one gpudockd, made inside a running event loop and closed after use, best by `async with`.

    Calls that fail with UNAVAILABLE are made again for some time, mutations under the same `request_id`, so that they
    are made once. What a call ends with otherwise is a `GpudockError`.
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
        """Does not connect yet.

        Args:
            target: `unix:/path`, a path, or `host:port`; empty means $GPUDOCK_ADDRESS, else the socket
                `/run/gpudock/gpudock.sock`.
            token: sent with each call; empty means what the file named by $GPUDOCK_TOKEN_FILE holds, if that is set.
            ca: PEM file with the roots to trust in the place of the system's. Implies `tls`.
            cert: PEM file with the client's certificate chain, with `key`. Implies `tls`.
            key: PEM file with the private key of `cert`.
            tls: whether to use TLS.
            timeout: how many seconds one try of a call that changes nothing may take. Mutations have no deadline.
            retry_for: for how many seconds a call is made again after UNAVAILABLE; also one that begins an operation or
                watches it, until it has its first answer.
            reattach_for: for how many seconds an operation that was seen is sought again after its connection broke.

        Raises:
            ValueError: a token would travel in the clear.
            OSError: a file cannot be read.
        """
        endpoint = Endpoint(address=target, token=token, ca=ca, cert=cert, key=key, tls=tls)
        calls = Calls(endpoint.metadata(), timeout, retry_for, reattach_for)
        self._channel = endpoint.open()
        self.target: str = endpoint.target
        """The daemon's address, as gRPC takes it."""
        self.operations: Operations = Operations(calls, self._channel)
        self.containers: Containers = Containers(calls, self._channel, self.operations)
        self.volumes: Volumes = Volumes(calls, self._channel, self.operations)
        self.node: Nodes = Nodes(calls, self._channel)

    async def ready(self, timeout: float = 5.0) -> None:
        """Connect; raises Unavailable if that does not succeed within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._channel.channel_ready()
        except TimeoutError:
            raise Unavailable(f"gpudockd does not answer at {self.target}", code=grpc.StatusCode.UNAVAILABLE) from None

    async def close(self) -> None:
        """End every call that is under way, and the connection. Operations go on at the server."""
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
    """A client that is connected: `async with gpudock.connect() as client`. Its arguments are those of `Client`.

    Raises Unavailable if the daemon does not answer within `timeout` seconds.
    """
    async with Client(target, token=token, ca=ca, cert=cert, key=key, tls=tls) as client:
        await client.ready(timeout)
        yield client
