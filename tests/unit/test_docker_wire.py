"""The wire to the engine: nothing is lost of a flow, at whatever moments it is looked at."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator

import pytest
from gpudock_server.adapters.docker.wire import SocketWire

KIB = 1024
# Longer than a wire gathers what comes in a flow.
LATER = 0.003


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours and the engine's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)  # noqa: FBT003 - the library's signature
    with ours, theirs:
        yield ours, theirs


async def taken(wire: SocketWire) -> bytes:
    """What it has."""
    block = bytes(await wire.wait())
    wire.taken(len(block))
    return block


async def test_a_flow_that_pauses_has_not_ended(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = SocketWire(ends[0])
    ends[1].sendall(b"a" * 64 * KIB)
    assert await taken(wire)
    ends[1].sendall(b"b" * KIB)
    await asyncio.sleep(LATER)
    ends[1].sendall(b"c" * KIB)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    while not (await taken(wire)).endswith(b"c"):
        pass
    waiting = asyncio.create_task(taken(wire))
    await asyncio.sleep(LATER)
    assert not waiting.done()
    ends[1].sendall(b"d")
    assert await waiting == b"d"
    ends[1].shutdown(socket.SHUT_WR)
    assert await taken(wire) == b""
    wire.close()


async def test_all_of_a_flow_arrives_in_order_at_any_pace(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = SocketWire(ends[0])
    dice = random.Random(3)  # noqa: S311 - the same paces every time
    sent = dice.randbytes(8 * KIB * KIB)

    def send() -> None:
        paces, at = random.Random(4), 0  # noqa: S311 - likewise
        while at < len(sent):
            size = paces.randrange(1, 40 * KIB)
            ends[1].sendall(sent[at : at + size])
            at += size
        ends[1].shutdown(socket.SHUT_WR)

    sending = asyncio.create_task(asyncio.to_thread(send))
    got = bytearray()
    while block := await wire.wait():
        count = dice.randrange(len(block) + 1)
        got += block[:count]
        wire.taken(count)
        if not count or dice.random() < 0.3:
            await asyncio.sleep(dice.random() * LATER)
        if not count and len(got) + len(block) == len(sent):
            # What was not taken comes again with what follows, and nothing does.
            got += block
            break
    await sending
    assert got == sent
    wire.close()
