"""The connection to the daemon: address, TLS and token."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import grpc
import grpc.aio

DEFAULT_ADDRESS = "unix:/run/gpudock/gpudock.sock"
ADDRESS_VARIABLE = "GPUDOCK_ADDRESS"
TOKEN_FILE_VARIABLE = "GPUDOCK_TOKEN_FILE"  # noqa: S105 - the name of a variable

# A page of a list may have 1000 containers with long specs.
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# By default, gRPC servers disconnect a client that pings more often than every 5 minutes.
_KEEPALIVE_MS = 310_000
_KEEPALIVE_TIMEOUT_MS = 20_000


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of the daemon and the credentials for it.

    `address` is `unix:/path`, a path, or `host:port`; empty means $GPUDOCK_ADDRESS, else the default socket. TLS is
    used if `tls` is set or any of the PEM files `ca` (instead of the system's roots), `cert` and `key` is given.
    An empty `token` means the content of the file that $GPUDOCK_TOKEN_FILE names, if it is set.
    """

    address: str = ""
    token: str = field(default="", repr=False)
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    tls: bool = False

    @property
    def target(self) -> str:
        """The address in the syntax of gRPC."""
        address = self.address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        return f"unix:{address}" if address.startswith("/") else address

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of every call; raises ValueError if the token would be sent unencrypted."""
        token = self.token or _token_of_environment()
        if not token:
            return ()
        if not self._protects_token():
            raise ValueError(
                f"the token would be sent unencrypted to {self.target}; use TLS: give `ca`, or `tls` for public roots"
            )
        return (("authorization", f"Bearer {token}"),)

    def open(self) -> grpc.aio.Channel:
        """Return a channel that connects on first use. Needs a running event loop."""
        options: list[tuple[str, str | int]] = [
            ("grpc.primary_user_agent", f"gpudock/{_version()}"),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            # A daemon that restarts listens again within a second or two.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if not self._is_unix():
            options += [
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ]
        if not self._uses_tls():
            return grpc.aio.insecure_channel(self.target, options=options)
        credentials = grpc.ssl_channel_credentials(
            _read_optional(self.ca), _read_optional(self.key), _read_optional(self.cert)
        )
        return grpc.aio.secure_channel(self.target, credentials, options=options)

    def _uses_tls(self) -> bool:
        return self.tls or any((self.ca, self.cert, self.key))

    def _is_unix(self) -> bool:
        return self.target.startswith(("unix:", "unix-abstract:"))

    def _protects_token(self) -> bool:
        return self._uses_tls() or self._is_unix() or _is_loopback(self.target)


def _is_loopback(target: str) -> bool:
    host = target.rpartition("/")[2].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token_of_environment() -> str:
    path = os.environ.get(TOKEN_FILE_VARIABLE)
    return read_token(Path(path)) if path else ""


def read_token(path: Path) -> str:
    """Return the token in a file, stripped of white space; raises ValueError if the file is empty."""
    token = path.read_text().strip()
    if not token:
        raise ValueError(f"token file {path} is empty; it must contain a token")
    return token


def _read_optional(path: Path | None) -> bytes | None:
    return path.read_bytes() if path else None


def _version() -> str:
    try:
        return version("gpudock")
    except PackageNotFoundError:  # run from a source tree
        return "0"
