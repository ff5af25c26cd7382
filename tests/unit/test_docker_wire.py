"""SocketRawStream: no data of a bulk transfer is lost, whatever the timing of reads."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator

import pytest
from gpudock_server.adapters.docker.raw_stream import SocketRawStream

KIB = 1024
# Longer than a stream gathers bulk data, on a kernel whose clock ticks every 4 ms.
LATER = 0.012


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end and the engine's end of a connection."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)  # noqa: FBT003 - the library's signature
    with ours, theirs:
        yield ours, theirs


async def taken(wire: SocketRawStream) -> bytes:
    """The next data of a stream, consumed."""
    block = bytes(await wire.wait())
    wire.consume(len(block))
    return block


async def test_a_flow_that_pauses_has_not_ended(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = SocketRawStream(ends[0])
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
    wire = SocketRawStream(ends[0])
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
        wire.consume(count)
        if not count or dice.random() < 0.3:
            await asyncio.sleep(dice.random() * LATER)
        if not count and len(got) + len(block) == len(sent):
            # Data that was not consumed is returned with the next data, and there is none.
            got += block
            break
    await sending
    assert got == sent
    wire.close()


async def test_whoever_takes_nothing_sees_it_all_again_with_what_follows(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """More than a block, received by the event loop and by the thread."""
    wire = SocketRawStream(ends[0])
    sent = random.Random(5).randbytes(1700 * KIB)  # noqa: S311 - the same bytes every time
    ends[1].sendall(sent[: 64 * KIB])
    assert await taken(wire) == sent[: 64 * KIB]
    sending = asyncio.create_task(asyncio.to_thread(ends[1].sendall, sent[64 * KIB :]))
    seen = b""
    while len(seen) < len(sent) - 64 * KIB:
        block = bytes(await wire.wait())
        assert len(block) > len(seen)
        assert block.startswith(seen)
        seen = block
        wire.consume(0)
    await sending
    assert seen == sent[64 * KIB :]
    wire.close()


async def test_a_flow_comes_in_blocks_and_its_last_piece_at_once(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = SocketRawStream(ends[0])
    sizes: list[int] = []
    sending = asyncio.create_task(asyncio.to_thread(_send_pieces, ends[1], 10 * KIB, 800))
    while sum(sizes) < 8000 * KIB:
        sizes.append(len(await taken(wire)))
    await sending
    # Without gathering there would be 800.
    assert len(sizes) < 200
    assert max(sizes) <= 512 * KIB
    # The other side keeps the connection open and sends nothing more.
    assert sum(sizes) == 8000 * KIB
    wire.close()


def _send_pieces(end: socket.socket, size: int, count: int) -> None:
    for _ in range(count):
        end.sendall(b"x" * size)


async def test_closed_while_a_flow_is_gathered(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = SocketRawStream(ends[0])
    ends[1].sendall(b"a" * 64 * KIB)
    assert await taken(wire)
    waiting = asyncio.create_task(taken(wire))
    ends[1].sendall(b"b" * 64 * KIB)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    wire.close()
    await waiting
    assert ends[0].fileno() < 0
    assert await taken(wire) == b""
    wire.close()


async def test_what_the_other_side_does_not_read_holds_the_sender_back_and_not_the_receiver(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    wire = SocketRawStream(ends[0])
    sending = asyncio.create_task(wire.send(b"x" * 2048 * KIB))
    await asyncio.sleep(LATER)
    ends[1].sendall(b"answer")
    assert await taken(wire) == b"answer"
    assert not sending.done()
    got = await asyncio.to_thread(_receive, ends[1], 2048 * KIB)
    assert await sending
    assert got == b"x" * 2048 * KIB
    wire.close()


def _receive(end: socket.socket, size: int) -> bytes:
    end.setblocking(True)  # noqa: FBT003 - the library's signature
    return end.recv(size, socket.MSG_WAITALL)
