"""ports.PortProbe: check whether a host port is free by binding it."""

from __future__ import annotations

import errno
import socket
from typing import Final

_KINDS: Final = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_WILDCARDS: Final = ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))  # noqa: S104 - the addresses that the engine binds
# Errors of socket() and bind() on a host without IPv6.
_NO_SUCH_FAMILY: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})


class HostPortProbe:
    """Implements ports.PortProbe; must run in the network namespace in which the engine publishes ports.

    It detects sockets. A port that another engine forwards with firewall rules only (userland proxy disabled) has no
    socket and is not detected.
    """

    async def __call__(self, protocol: str, port: int) -> bool:
        """Whether `port` (1 to 65535) of `protocol` ("tcp" or "udp") can be bound now, for IPv4 and IPv6.

        bind(2) takes microseconds and never waits, so it needs no thread. The socket never listens, so no client can
        connect to it.
        """
        return all(_bindable(family, _KINDS[protocol], address, port) for family, address in _WILDCARDS)


def _bindable(family: socket.AddressFamily, kind: socket.SocketKind, address: str, port: int) -> bool:
    try:
        with socket.socket(family, kind) as probe:
            if kind is socket.SOCK_STREAM:
                # The engine's proxy also sets it: connections in TIME_WAIT do not block the port, listeners still do.
                # For UDP the option would share a port that is in use.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((address, port))
    except OSError as error:
        return family is socket.AF_INET6 and error.errno in _NO_SUCH_FAMILY
    return True
