"""DockerExecSession on a real engine: output, input and terminals."""

from __future__ import annotations

import asyncio
import hashlib
import resource
import socket
import struct
import time
from collections.abc import Awaitable, Callable

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.docker.exec_session import HEADER_BYTES, FrameDecoder
from gpudock_server.adapters.docker.raw_stream import SocketRawStream
from gpudock_server.model.engine import ExecRequest, TerminalSize
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.docker_fixtures import engine
from tests.engine.exec_sessions import ERR, OUT, box, open_session, read_all, run_exec, shell_request
from tests.rig.patience import limit

__all__ = ["box", "engine"]

MIB = 1 << 20
_frames = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=12)


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BxxxL", kind, len(payload)) + payload


@given(_frames, st.integers(1, 30))
def test_frames_are_decoded_wherever_they_are_cut(frames: list[tuple[int, bytes]], cut: int) -> None:
    wire = b"".join(frame(kind, payload) for kind, payload in frames)
    decoder, decoded, rest = FrameDecoder(), [], b""
    for position in range(0, len(wire), cut):
        rest += wire[position : position + cut]
        chunks, used = decoder.decode(memoryview(rest))
        rest = rest[used:]
        decoded += chunks
        assert len(rest) < HEADER_BYTES
    assert rest == b""
    assert all(chunk for _, chunk in decoded)
    # The same bytes in the same order, in any blocks.
    streams = {1: OUT, 2: ERR}
    assert [(stream, byte) for stream, chunk in decoded for byte in chunk] == [
        (streams[kind], byte) for kind, payload in frames for byte in payload
    ]


def test_neighbouring_frames_of_a_stream_become_one_chunk() -> None:
    frames = [(1, b"a"), (1, b"b"), (2, b"c"), (3, b"d"), (1, b""), (1, b"e")]
    wire = b"".join(frame(kind, payload) for kind, payload in frames)
    assert FrameDecoder().decode(memoryview(wire))[0] == [(OUT, b"ab"), (ERR, b"cd"), (OUT, b"e")]


async def test_stdout_stderr_and_the_exit_code_are_separate(engine: DockerEngine, box: str) -> None:
    request = ExecRequest(
        ("sh", "-c", "echo out; echo err >&2; echo $A; pwd; id -u; exit 3"),
        env={"A": "b=c d"},
        working_dir="/tmp",
        user="user",
    )
    assert await run_exec(engine, box, request) == (b"out\nb=c d\n/tmp\n1000\n", b"err\n", 3)


@pytest.mark.deep
async def test_no_byte_of_much_output_is_lost(engine: DockerEngine, box: str) -> None:
    """The bytes of stdout and stderr, compared by their hashes."""
    numbers = {OUT: range(10_000_000, 13_000_000), ERR: range(100_000, 250_000)}
    commands = {stream: f"seq {lines.start} {lines.stop - 1}" for stream, lines in numbers.items()}
    expected = {stream: _hash_of_lines(lines) for stream, lines in numbers.items()}
    async with open_session(engine, box, shell_request(f"{commands[OUT]}; {commands[ERR]} >&2; exit 7")) as session:
        digests = {stream: hashlib.sha256() for stream in numbers}
        async for stream, chunk in session.read():
            assert len(chunk) <= 512 * 1024
            digests[stream].update(chunk)
        assert {stream: digest.hexdigest() for stream, digest in digests.items()} == expected
        assert (await session.status()).exit_code == 7


def _hash_of_lines(numbers: range) -> str:
    """The hash of the output of `seq`."""
    digest = hashlib.sha256()
    for start in range(numbers.start, numbers.stop, 10_000):
        digest.update("".join(f"{number}\n" for number in range(start, min(start + 10_000, numbers.stop))).encode())
    return digest.hexdigest()


async def test_a_slow_reader_blocks_the_process(engine: DockerEngine, box: str) -> None:
    counter = "/tmp/progress"
    script = f"n=0; while :; do head -c 1048576 /dev/zero; n=$((n+1)); echo $n > {counter}; done"
    async with open_session(engine, box, shell_request(script)) as session:
        reader = session.read()
        await anext(reader)

        async def written() -> int:
            out, _, _ = await run_exec(engine, box, shell_request(f"cat {counter} 2>/dev/null || echo 0"))
            return int(out or 0)

        before = await stable_value(written)
        # The buffers on the way: a block of the session, the socket's, the engine's and two pipes.
        assert before <= 4
        await anext(reader)
        await reader.aclose()  # type: ignore[attr-defined]  # an async generator; the protocol has only AsyncIterator


async def stable_value(measure: Callable[[], Awaitable[int]]) -> int:
    """Measure until ten values in a row are the same, and return it."""
    last, same = -1, 0
    while same < 10:
        now = await measure()
        last, same = now, same + 1 if now == last else 0
    return last


async def test_reading_needs_bounded_memory(engine: DockerEngine, box: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with open_session(engine, box, shell_request("head -c 100000000 /dev/zero")) as session:
        async for _ in session.read():
            pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024, "KiB"


async def test_small_pieces_are_returned_at_once_and_large_ones_are_gathered() -> None:
    near, far = socket.socketpair()
    near.setblocking(False)  # noqa: FBT003 - the library's signature
    wire = SocketRawStream(near)
    far.sendall(b"x" * 5000)
    assert len(await wire.wait()) == 5000
    wire.consume(5000)
    # After a large piece, pieces that arrive shortly after each other are returned together.
    far.sendall(b"a" * 10)
    gathering = asyncio.create_task(_length(wire))
    await asyncio.sleep(0)
    assert not gathering.done()
    far.sendall(b"b" * 10)
    assert await gathering == 20
    wire.consume(20)
    # After a small piece, the next one is returned at once.
    far.sendall(b"c")
    assert await _length(wire) == 1
    wire.consume(1)
    far.close()
    assert await _length(wire) == 0
    wire.close()


async def _length(wire: SocketRawStream) -> int:
    return len(await wire.wait())


async def test_close_stdin_ends_the_input(engine: DockerEngine, box: str) -> None:
    async with open_session(engine, box, shell_request("cat; echo after >&2; exit 5", stdin=True)) as session:
        await session.write(b"one ")
        await session.write(b"")
        await session.write(b"two")
        await session.close_stdin()
        assert await read_all(session) == (b"one two", b"after\n")
        assert (await session.status()).exit_code == 5


@pytest.mark.deep
async def test_a_gigabyte_of_input_in_bounded_memory(engine: DockerEngine, box: str) -> None:
    block = bytes(range(256)) * 4096
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with open_session(engine, box, shell_request("wc -c", stdin=True)) as session:
        longest = 0.0
        for _ in range(1000):
            begun = time.monotonic()
            await session.write(block)
            longest = max(longest, time.monotonic() - begun)
        await session.close_stdin()
        out, _ = await read_all(session)
    assert int(out) == 1000 * len(block)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024, "KiB"


async def test_a_large_write_does_not_block_the_event_loop(engine: DockerEngine, box: str) -> None:
    async with open_session(engine, box, shell_request("cat >/dev/null", stdin=True)) as session:
        writing = asyncio.create_task(session.write(bytes(200 * MIB)))
        turns = 0
        while not writing.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 100
        await session.close_stdin()
        await read_all(session)


@pytest.mark.parametrize("script", ["head -c 10; exit 4", "exec <&-; echo done; exit 4", "exit 4"])
async def test_no_output_is_lost_when_the_process_does_not_read_its_input(
    engine: DockerEngine, box: str, script: str
) -> None:
    async with open_session(engine, box, shell_request(f"head -c 300000 /dev/zero; {script}", stdin=True)) as session:
        writing = asyncio.create_task(session.write(b"x" * 10_000_000))
        out, _ = await read_all(session)
        assert len(out) >= 300_000
        await asyncio.wait_for(writing, limit(5))
        await session.write(b"more")
        await session.close_stdin()
        assert (await session.status()).exit_code == 4


async def test_a_terminal_has_its_first_and_its_changed_size(engine: DockerEngine, box: str) -> None:
    # A shell runs a trap when its child has ended.
    on_resize = "trap 'stty size; exit 9' WINCH"
    script = f"until [ \"$(stty size)\" = '33 101' ]; do :; done; {on_resize}; echo sized >&2; cat"
    async with open_session(
        engine, box, shell_request(script, tty=True, stdin=True, size=TerminalSize(columns=101, rows=33))
    ) as session:
        reader = session.read()
        output = b""
        while b"sized" not in output:
            stream, chunk = await anext(reader)
            assert stream is OUT, "a terminal has stderr"
            output += chunk
        await session.resize(TerminalSize(columns=120, rows=40))
        await session.close_stdin()
        async for _, chunk in reader:
            output += chunk
        assert b"40 120" in output
        assert (await session.status()).exit_code == 9
        await session.resize(TerminalSize(columns=1, rows=1))


@pytest.mark.parametrize("text", [b"hello\n", b"hello", b""])
async def test_close_stdin_ends_the_input_of_a_terminal(engine: DockerEngine, box: str, text: bytes) -> None:
    async with open_session(
        engine, box, shell_request("stty -echo; echo ready; cat; exit 6", tty=True, stdin=True)
    ) as session:
        reader = session.read()
        output = b""
        while b"ready\r\n" not in output:
            output += (await anext(reader))[1]
        await session.write(text)
        await session.close_stdin()
        async for _, chunk in reader:
            output += chunk
        assert output == b"ready\r\n" + text.replace(b"\n", b"\r\n")
        assert (await session.status()).exit_code == 6


async def test_the_detach_keys_of_the_engine_reach_the_process(engine: DockerEngine, box: str) -> None:
    async with open_session(
        engine, box, shell_request("stty raw -echo; echo ready; head -c 2", tty=True, stdin=True)
    ) as session:
        reader = session.read()
        output = b""
        while b"ready" not in output:
            output += (await anext(reader))[1]
        await session.write(b"\x10\x11")
        async for _, chunk in reader:
            output += chunk
        assert output.endswith(b"\x10\x11")
        assert (await session.status()).exit_code == 0
