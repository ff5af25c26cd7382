"""ports.PortProbe: whether a host port can be bound, by binding it."""

from __future__ import annotations

import errno
import socket
from typing import Final

_KINDS: Final = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_WILDCARDS: Final = ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))  # noqa: S104 - what the engine will bind
# How a host without IPv6 answers, at the one call or the other.
_NO_SUCH_FAMILY: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})


class HostPortProbe:
    """Implements ports.PortProbe; must run in the network namespace where the engine publishes ports.

    What it sees are sockets. A port that another engine forwards by firewall rules alone, with its userland proxy
    switched off, has none.
    """

    async def __call__(self, protocol: str, port: int) -> bool:
        """True when `port` (1 to 65535) of `protocol` ("tcp" or "udp") can be bound right now, for IPv4 and IPv6.

        Binding is a matter of microseconds and never waits, so it is done in place. Nothing ever listens: no client
        can reach the probe.
        """
        return all(_bindable(family, _KINDS[protocol], address, port) for family, address in _WILDCARDS)


def _bindable(family: socket.AddressFamily, kind: socket.SocketKind, address: str, port: int) -> bool:
    try:
        with socket.socket(family, kind) as probe:
            if kind is socket.SOCK_STREAM:
                # As the engine's proxy does: connections that linger in TIME_WAIT do not count, listeners still do.
                # For UDP the option would mean sharing a port that is in use.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((address, port))
    except OSError as error:
        return family is socket.AF_INET6 and error.errno in _NO_SUCH_FAMILY
    return True
