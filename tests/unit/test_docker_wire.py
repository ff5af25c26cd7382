"""SocketRawStream: no data of a bulk transfer is lost, with any timing of reads."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator

import pytest
from gpudock_server.adapters.docker.raw_stream import SocketRawStream

KIB = 1024
# Seconds; longer than a stream gathers bulk data, on a kernel whose clock ticks every 4 ms.
PAUSE = 0.012


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The daemon's end and the engine's end of a connection."""
    daemon_end, engine_end = socket.socketpair()
    daemon_end.setblocking(False)  # noqa: FBT003 - the library's signature
    with daemon_end, engine_end:
        yield daemon_end, engine_end


async def consume_next(wire: SocketRawStream) -> bytes:
    """Consume and return the next data of a stream."""
    block = bytes(await wire.wait())
    wire.consume(len(block))
    return block


async def test_a_stream_that_pauses_has_not_ended(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = SocketRawStream(ends[0])
    ends[1].sendall(b"a" * 64 * KIB)
    assert await consume_next(wire)
    ends[1].sendall(b"b" * KIB)
    await asyncio.sleep(PAUSE)
    ends[1].sendall(b"c" * KIB)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    while not (await consume_next(wire)).endswith(b"c"):
        pass
    waiting = asyncio.create_task(consume_next(wire))
    await asyncio.sleep(PAUSE)
    assert not waiting.done()
    ends[1].sendall(b"d")
    assert await waiting == b"d"
    ends[1].shutdown(socket.SHUT_WR)
    assert await consume_next(wire) == b""
    wire.close()


async def test_all_data_arrives_in_order_at_any_pace(ends: tuple[socket.socket, socket.socket]) -> None:
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
            await asyncio.sleep(dice.random() * PAUSE)
        if not count and len(got) + len(block) == len(sent):
            # Data that was not consumed is returned with the next data, and there is none.
            got += block
            break
    await sending
    assert got == sent
    wire.close()


async def test_data_that_is_not_consumed_is_returned_again_with_the_next_data(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """The data is larger than a block, so that the event loop and the thread receive it."""
    wire = SocketRawStream(ends[0])
    sent = random.Random(5).randbytes(1700 * KIB)  # noqa: S311 - the same bytes every time
    ends[1].sendall(sent[: 64 * KIB])
    assert await consume_next(wire) == sent[: 64 * KIB]
    sending = asyncio.create_task(asyncio.to_thread(ends[1].sendall, sent[64 * KIB :]))
    unconsumed = b""
    while len(unconsumed) < len(sent) - 64 * KIB:
        block = bytes(await wire.wait())
        assert len(block) > len(unconsumed)
        assert block.startswith(unconsumed)
        unconsumed = block
        wire.consume(0)
    await sending
    assert unconsumed == sent[64 * KIB :]
    wire.close()


async def test_bulk_data_is_gathered_in_blocks_and_its_end_is_returned_at_once(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    wire = SocketRawStream(ends[0])
    sizes: list[int] = []
    sending = asyncio.create_task(asyncio.to_thread(_send_pieces, ends[1], 10 * KIB, 800))
    while sum(sizes) < 8000 * KIB:
        sizes.append(len(await consume_next(wire)))
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


async def test_a_stream_can_be_closed_while_it_gathers_data(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = SocketRawStream(ends[0])
    ends[1].sendall(b"a" * 64 * KIB)
    assert await consume_next(wire)
    waiting = asyncio.create_task(consume_next(wire))
    ends[1].sendall(b"b" * 64 * KIB)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    wire.close()
    await waiting
    assert ends[0].fileno() < 0
    assert await consume_next(wire) == b""
    wire.close()


async def test_a_send_that_waits_for_the_engine_does_not_block_receiving(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    wire = SocketRawStream(ends[0])
    sending = asyncio.create_task(wire.send(b"x" * 2048 * KIB))
    await asyncio.sleep(PAUSE)
    ends[1].sendall(b"answer")
    assert await consume_next(wire) == b"answer"
    assert not sending.done()
    got = await asyncio.to_thread(_receive, ends[1], 2048 * KIB)
    assert await sending
    assert got == b"x" * 2048 * KIB
    wire.close()


def _receive(end: socket.socket, size: int) -> bytes:
    end.setblocking(True)  # noqa: FBT003 - the library's signature
    return end.recv(size, socket.MSG_WAITALL)
