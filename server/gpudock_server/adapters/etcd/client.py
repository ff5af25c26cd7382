"""The address of etcd, and a client with several endpoints, TLS, login and keep-alive, which aetcd's client lacks."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import aetcd
import grpc
import grpc.aio
from aetcd import rpc

from gpudock_server.startup import StartupError

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_UNIX = "unix:"
_HOST_PORT = re.compile(r"^(\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})$", re.ASCII)


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """PEM files. Without `ca`, grpc's default authorities are trusted.

    `certificate` and `key` are set together, if etcd requires client certificates. The certificates of all endpoints
    must be valid for `server_name`; if empty, for the first endpoint's host.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """Endpoints, TLS and credentials of etcd.

    `endpoints` are `host:port` (IPv6 in brackets), or exactly one `unix:/absolute/path` of a socket.
    """

    endpoints: tuple[str, ...]
    tls: EtcdTls | None = None
    user: str = ""
    password: str = field(default="", repr=False)


class EtcdClient(aetcd.Client):  # type: ignore[misc] # aetcd ships no types
    """aetcd's client with a channel of our own. `timeout` (seconds) limits the login.

    Only its generated stubs are used. Their errors are not translated (`connect` and `log_in` raise AioRpcError).
    """

    def __init__(self, address: EtcdAddress, *, timeout: float) -> None:
        # Without user and password: aetcd's login never renews its token.
        super().__init__(timeout=timeout)
        # Sent with every call: the token, after a login.
        self.metadata: Metadata | None = None
        self._address = address
        self._login = asyncio.Lock()

    async def connect(self) -> None:
        """Open the channel and log in. Raises StartupError for an unusable address or certificates."""
        if not self._connected.is_set():
            await self._make_channel()
        if self._address.user:
            await self.log_in(instead_of=None)

    async def _make_channel(self) -> None:
        target = await _dial_target(self._address.endpoints)
        options = _options(self._address)
        if self._address.tls is None:
            self.channel = rpc.insecure_channel(target, options=options)
        else:
            self.channel = rpc.secure_channel(target, await asyncio.to_thread(_credentials, self._address.tls), options)
        self.auth_stub = rpc.AuthStub(self.channel)
        self.kvstub = rpc.KVStub(self.channel)
        self.leasestub = rpc.LeaseStub(self.channel)
        self.watchstub = rpc.WatchStub(self.channel)
        self.maintenancestub = rpc.MaintenanceStub(self.channel)
        self._connected.set()

    async def log_in(self, *, instead_of: Metadata | None) -> None:
        """Get a new token, unless another task has replaced `instead_of` meanwhile. Raises StartupError."""
        async with self._login:
            if self.metadata != instead_of:
                return
            request = rpc.AuthenticateRequest(name=self._address.user, password=self._address.password)
            try:
                answer = await self.auth_stub.Authenticate(request, timeout=self._timeout)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
                    raise StartupError(
                        f"etcd rejected user {self._address.user!r}: {error.details()}", "check the credentials"
                    ) from None
                raise
            self.metadata = (("token", answer.token),)


async def _dial_target(endpoints: tuple[str, ...]) -> str:
    """The target for grpc, which takes several addresses only as IP addresses of one family."""
    if not endpoints:
        raise StartupError("no etcd endpoint is configured", "set etcd_endpoints, for example 10.0.0.5:2379")
    if endpoints[0].startswith(_UNIX):
        if len(endpoints) > 1:
            raise StartupError(f"{endpoints[0]} must be the only etcd endpoint", "remove the other endpoints")
        return endpoints[0]
    pairs = [_host_port(endpoint) for endpoint in endpoints]
    if len(pairs) == 1:
        return endpoints[0]
    addresses = [address for host, port in pairs for address in await _resolve(host, port)]
    families = {address.version for address, _ in addresses}
    # If the endpoints have no family in common, the larger group is used.
    family = max(families, key=lambda version: sum(address.version == version for address, _ in addresses))
    chosen = dict.fromkeys(
        f"{address}:{port}" if isinstance(address, ipaddress.IPv4Address) else f"[{address}]:{port}"
        for address, port in addresses
        if address.version == family
    )
    return f"ipv{family}:" + ",".join(chosen)


def _host_port(endpoint: str) -> tuple[str, int]:
    match = _HOST_PORT.match(endpoint)
    if match is None:
        raise StartupError(f"invalid etcd endpoint {endpoint!r}", "use host:port, [IPv6]:port or unix:/absolute/path")
    return match["v6"] or match["host"], int(match["port"])


async def _resolve(host: str, port: int) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(f"cannot resolve etcd endpoint {host}:{port}: {error}", "check the host name") from error
    return [(ipaddress.ip_address(address[0]), port) for *_, address in found]


def _credentials(tls: EtcdTls) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        raise StartupError("etcd client certificate and key must be set together", "set both or neither")
    try:
        # Checked with Python's ssl, which reports errors: with bad files grpc keeps retrying, or aborts the process.
        trial = ssl.create_default_context(cafile=tls.ca)
        if tls.certificate:
            trial.load_cert_chain(tls.certificate, tls.key)
        return grpc.ssl_channel_credentials(
            root_certificates=tls.ca.read_bytes() if tls.ca else None,
            private_key=tls.key.read_bytes() if tls.key else None,
            certificate_chain=tls.certificate.read_bytes() if tls.certificate else None,
        )
    except OSError as error:  # As is ssl.SSLError.
        files = ", ".join(str(file) for file in (tls.ca, tls.certificate, tls.key) if file)
        raise StartupError(
            f"cannot load the etcd certificates ({files}): {error}", "check that they are readable PEM files"
        ) from error


def _options(address: EtcdAddress) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        # etcd accepts a ping every 5 s and disconnects clients that send more; 6 s allows for jitter. Pings are sent
        # only while a call is open: etcd counts others as abuse. The connection is closed after 2 s without a pong.
        ("grpc.keepalive_time_ms", 6000),
        ("grpc.keepalive_timeout_ms", 2000),
        ("grpc.http2.ping_timeout_ms", 2000),
        ("grpc.http2.max_pings_without_data", 0),
        # Reconnects to a restarted etcd within a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # A page or a history may be larger than grpc's default of 4 MiB; gpudock wrote what is in the store.
        ("grpc.max_receive_message_length", -1),
        # The proxy of the environment is not for etcd.
        ("grpc.enable_http_proxy", 0),
    ]
    if len(address.endpoints) > 1:
        # A try after a timeout goes to another member.
        options.append(("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})))
    if address.tls is not None:
        name = address.tls.server_name
        if not name and len(address.endpoints) > 1:
            name = _host_port(address.endpoints[0])[0]
        if name:
            options.append(("grpc.ssl_target_name_override", name))
    return options
