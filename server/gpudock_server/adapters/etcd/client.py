"""Where etcd is, and a channel to it: several endpoints, TLS, login, and keep-alive, which aetcd's own client lacks."""

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
    """PEM files. Without `ca`, the authorities that grpc knows are trusted.

    `certificate` and `key` go together and are needed where etcd asks clients for one. `server_name` is what the
    certificates of all endpoints must be valid for; empty: the first endpoint's host.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """Where etcd is and how to speak to it.

    `endpoints` are all `host:port` (IPv6 in brackets), or one `unix:/absolute/path`, the file of the socket.
    """

    endpoints: tuple[str, ...]
    tls: EtcdTls | None = None
    user: str = ""
    password: str = field(default="", repr=False)


class EtcdClient(aetcd.Client):  # type: ignore[misc] # aetcd ships no types
    """aetcd's client with a channel that we make. `timeout` (s) bounds the login.

    Its generated stubs are what we use; errors of theirs come as they are (`connect` and `log_in` raise AioRpcError).
    """

    def __init__(self, address: EtcdAddress, *, timeout: float) -> None:
        # Without user and password: the login is ours, because aetcd's keeps one token for ever.
        super().__init__(timeout=timeout)
        # What goes with every call: the token, once there is one.
        self.metadata: Metadata | None = None
        self._address = address
        self._login = asyncio.Lock()

    async def connect(self) -> None:
        """Make the channel and log in. Raises StartupError for an address or certificates that cannot be used."""
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
        """Get a new token, unless somebody else has replaced `instead_of` in the meantime. Raises StartupError."""
        async with self._login:
            if self.metadata != instead_of:
                return
            request = rpc.AuthenticateRequest(name=self._address.user, password=self._address.password)
            try:
                answer = await self.auth_stub.Authenticate(request, timeout=self._timeout)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
                    raise StartupError(
                        f"etcd does not let user {self._address.user!r} in: {error.details()}", "check the credentials"
                    ) from None
                raise
            self.metadata = (("token", answer.token),)


async def _dial_target(endpoints: tuple[str, ...]) -> str:
    """What grpc dials: it takes several addresses only as numbers, and only of one family."""
    if not endpoints:
        raise StartupError("no etcd endpoint is given", "name at least one, as in 10.0.0.5:2379")
    if endpoints[0].startswith(_UNIX):
        if len(endpoints) > 1:
            raise StartupError(f"{endpoints[0]} cannot be one of several etcd endpoints", "give it alone")
        return endpoints[0]
    pairs = [_host_port(endpoint) for endpoint in endpoints]
    if len(pairs) == 1:
        return endpoints[0]
    addresses = [address for host, port in pairs for address in await _resolve(host, port)]
    families = {address.version for address, _ in addresses}
    # Where some endpoints have only the one family and some only the other, the larger group is what can be dialled.
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
        raise StartupError(
            f"{endpoint!r} is no etcd endpoint", "it must read host:port, [IPv6]:port or unix:/absolute/path"
        )
    return match["v6"] or match["host"], int(match["port"])


async def _resolve(host: str, port: int) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(f"the etcd endpoint {host}:{port} has no address: {error}", "check the name") from error
    return [(ipaddress.ip_address(address[0]), port) for *_, address in found]


def _credentials(tls: EtcdTls) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        raise StartupError("etcd's client certificate needs a key, and the key a certificate", "give both or neither")
    try:
        # Read for once by Python's ssl, which says what is wrong: grpc hangs on to bad files, or aborts the process.
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
            f"the certificates for etcd ({files}) cannot be used: {error}", "check that they are PEM and can be read"
        ) from error


def _options(address: EtcdAddress) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        # etcd takes a ping every 5 s and hangs up on a client that sends more; 6 s leaves room for jitter. They are
        # sent only while a call is open: etcd counts others as abuse. A peer that is silent for 2 s is given up.
        ("grpc.keepalive_time_ms", 6000),
        ("grpc.keepalive_timeout_ms", 2000),
        ("grpc.http2.ping_timeout_ms", 2000),
        ("grpc.http2.max_pings_without_data", 0),
        # A restarted etcd is found within a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # A page or a history may be larger than grpc's 4 MiB; what is in our store, we wrote.
        ("grpc.max_receive_message_length", -1),
        # A proxy from the environment is for the world outside.
        ("grpc.enable_http_proxy", 0),
    ]
    if len(address.endpoints) > 1:
        # One after the other, and past those that fail: a try after a time-out goes to another member.
        options.append(("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})))
    if address.tls is not None:
        name = address.tls.server_name
        if not name and len(address.endpoints) > 1:
            name = _host_port(address.endpoints[0])[0]
        if name:
            options.append(("grpc.ssl_target_name_override", name))
    return options
