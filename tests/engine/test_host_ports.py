"""HostPortProbe: whether a port of the host is in use."""

from __future__ import annotations

import socket
from contextlib import closing

from gpudock_server.adapters.host.port_probe import HostPortProbe


async def test_the_probe_finds_tcp_and_udp_ports_in_use() -> None:
    probe = HostPortProbe()
    for protocol, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)):
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")):  # noqa: S104 - other programs bind it
            with closing(socket.socket(family, kind)) as holder:
                holder.bind((address, 0))
                port = holder.getsockname()[1]
                if kind is socket.SOCK_STREAM:
                    holder.listen()
                assert not await probe(protocol, port)
            assert await probe(protocol, port)
            assert await probe(protocol, port), "the probe left the port in use"


async def test_a_connection_in_time_wait_does_not_count_as_in_use() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    server.close()
    # The side that closes first remains in TIME_WAIT.
    accepted.close()
    assert client.recv(1) == b""
    client.close()
    assert await HostPortProbe()("tcp", port)
