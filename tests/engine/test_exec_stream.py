"""DockerExecSession on a real engine: output, input, terminals, exit codes and lost connections."""

from __future__ import annotations

import asyncio
import hashlib
import resource
import signal
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.docker.exec_session import HEADER_BYTES, FrameDecoder
from gpudock_server.adapters.docker.raw_stream import SocketRawStream
from gpudock_server.adapters.host.processes import HostProcessControl
from gpudock_server.errors import EngineRejected, EngineUnavailable
from gpudock_server.model.container import Placement
from gpudock_server.model.engine import EngineContainerSpec, ExecRequest, ExecStatus, ExecStream, TerminalSize
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.ports import ExecSession
from hypothesis import given
from hypothesis import strategies as st

from tests.rig import EngineProxy, Rig
from tests.rig.patience import limit

IMAGE = "gpudock/busybox:test"
MIB = 1 << 20
OUT, ERR = ExecStream.STDOUT, ExecStream.STDERR


@pytest_asyncio.fixture
async def engine(clean_engine: Rig) -> AsyncIterator[DockerEngine]:
    async with connected_to(clean_engine.engine.url, timeout=30) as connected:
        yield connected


@asynccontextmanager
async def connected_to(url: str, *, timeout: float, tls: Path | None = None) -> AsyncIterator[DockerEngine]:
    engine = await DockerEngine.connect(url, tls=tls, timeout=timeout)
    try:
        yield engine
    finally:
        await engine.close()


@pytest_asyncio.fixture
async def box(engine: DockerEngine) -> str:
    """A container that runs and does nothing."""
    return await running(engine)


async def running(engine: DockerEngine) -> str:
    image = await engine.image(IMAGE)
    assert image is not None
    spec = ContainerSpec(image=IMAGE, command=("sleep", "1000"))
    engine_spec = EngineContainerSpec(
        "box", image.id, spec, Placement(), "box", {"gpudock.uid": "u1", "gpudock.name": "box"}
    )
    engine_id = await engine.create(engine_spec)
    await engine.start(engine_id)
    return engine_id


def shell(script: str, *, tty: bool = False, stdin: bool = False, size: TerminalSize | None = None) -> ExecRequest:
    return ExecRequest(("sh", "-c", script), tty=tty, stdin=stdin, size=size)


@asynccontextmanager
async def session_of(engine: DockerEngine, engine_id: str, request: ExecRequest) -> AsyncIterator[ExecSession]:
    session = await engine.exec(engine_id, request)
    try:
        yield session
    finally:
        await session.close()


async def all_of(session: ExecSession) -> tuple[bytes, bytes]:
    """Stdout and stderr until their end, and the exit code."""
    said = {OUT: bytearray(), ERR: bytearray()}
    async for stream, chunk in session.read():
        said[stream] += chunk
    return bytes(said[OUT]), bytes(said[ERR])


async def result_of(engine: DockerEngine, engine_id: str, request: ExecRequest) -> tuple[bytes, bytes, int | None]:
    async with session_of(engine, engine_id, request) as session:
        out, err = await all_of(session)
        status = await session.status()
        assert not status.running
        return out, err, status.exit_code


async def until(true: Callable[[], bool]) -> None:
    """Wait until `true` returns something true; limited by the test's timeout."""
    while not true():
        await asyncio.sleep(0.005)


async def started(session: ExecSession) -> int:
    """The pid, once there is one."""
    while not (pid := (await session.status()).pid):
        await asyncio.sleep(0.005)
    return pid


# ---- frames ----

_frames = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=12)


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BxxxL", kind, len(payload)) + payload


@given(_frames, st.integers(1, 30))
def test_frames_cut_anywhere(frames: list[tuple[int, bytes]], cut: int) -> None:
    wire = b"".join(frame(kind, payload) for kind, payload in frames)
    parser, said, held = FrameDecoder(), [], b""
    for position in range(0, len(wire), cut):
        held += wire[position : position + cut]
        chunks, used = parser.decode(memoryview(held))
        held = held[used:]
        said += chunks
        assert len(held) < HEADER_BYTES
    assert held == b""
    assert all(chunk for _, chunk in said)
    # The same bytes in the same order, however they are cut into blocks.
    streams = {1: OUT, 2: ERR}
    assert [(stream, byte) for stream, chunk in said for byte in chunk] == [
        (streams[kind], byte) for kind, payload in frames for byte in payload
    ]


def test_neighbours_become_one_chunk() -> None:
    wire = b"".join(frame(*each) for each in [(1, b"a"), (1, b"b"), (2, b"c"), (3, b"d"), (1, b""), (1, b"e")])
    assert FrameDecoder().decode(memoryview(wire))[0] == [(OUT, b"ab"), (ERR, b"cd"), (OUT, b"e")]


# ---- output ----


async def test_outputs_apart_and_the_exit_code(engine: DockerEngine, box: str) -> None:
    request = ExecRequest(
        ("sh", "-c", "echo out; echo err >&2; echo $A; pwd; id -u; exit 3"),
        env={"A": "b=c d"},
        working_dir="/tmp",
        user="user",
    )
    assert await result_of(engine, box, request) == (b"out\nb=c d\n/tmp\n1000\n", b"err\n", 3)


@pytest.mark.deep
async def test_much_output_arrives_whole(engine: DockerEngine, box: str) -> None:
    """All bytes of both outputs, compared by their hashes."""
    numbers = {OUT: range(10_000_000, 13_000_000), ERR: range(100_000, 250_000)}
    printing = {stream: f"seq {one.start} {one.stop - 1}" for stream, one in numbers.items()}
    expected = {stream: _hash_of_lines(one) for stream, one in numbers.items()}
    async with session_of(engine, box, shell(f"{printing[OUT]}; {printing[ERR]} >&2; exit 7")) as session:
        found = {stream: hashlib.sha256() for stream in numbers}
        async for stream, chunk in session.read():
            assert len(chunk) <= 512 * 1024
            found[stream].update(chunk)
        assert {stream: one.hexdigest() for stream, one in found.items()} == expected
        assert (await session.status()).exit_code == 7


def _hash_of_lines(numbers: range) -> str:
    """Of what `seq` prints."""
    digest = hashlib.sha256()
    for one in range(numbers.start, numbers.stop, 10_000):
        digest.update("".join(f"{number}\n" for number in range(one, min(one + 10_000, numbers.stop))).encode())
    return digest.hexdigest()


async def test_a_reader_that_waits_holds_the_process_back(engine: DockerEngine, box: str) -> None:
    counter = "/tmp/progress"
    script = f"n=0; while :; do head -c 1048576 /dev/zero; n=$((n+1)); echo $n > {counter}; done"
    async with session_of(engine, box, shell(script)) as session:
        reader = session.read()
        await anext(reader)

        async def written() -> int:
            out, _, _ = await result_of(engine, box, shell(f"cat {counter} 2>/dev/null || echo 0"))
            return int(out or 0)

        before = await settled(written)
        # What waits: our own block, the socket's, the engine's and two pipes.
        assert before <= 4
        await anext(reader)
        await reader.aclose()  # type: ignore[attr-defined]  # an async generator, which the protocol does not promise


async def settled(measure: Callable[[], Awaitable[int]]) -> int:
    """A number, once ten reads in a row returned the same."""
    last, same = -1, 0
    while same < 10:
        now = await measure()
        last, same = now, same + 1 if now == last else 0
    return last


async def test_reading_costs_no_more_than_a_block(engine: DockerEngine, box: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with session_of(engine, box, shell("head -c 100000000 /dev/zero")) as session:
        async for _ in session.read():
            pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024, "KiB"


async def test_small_talk_is_given_at_once_and_floods_are_gathered() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)  # noqa: FBT003 - the library's signature
    wire = SocketRawStream(ours)
    theirs.sendall(b"x" * 5000)
    assert len(await wire.wait()) == 5000
    wire.consume(5000)
    # Right behind a piece of some size: what comes within the moment comes as one.
    theirs.sendall(b"a" * 10)
    gathering = asyncio.create_task(_length(wire))
    await asyncio.sleep(0)
    assert not gathering.done()
    theirs.sendall(b"b" * 10)
    assert await gathering == 20
    wire.consume(20)
    # Behind a small one: at once.
    theirs.sendall(b"c")
    assert await _length(wire) == 1
    wire.consume(1)
    theirs.close()
    assert await _length(wire) == 0
    wire.close()


async def _length(wire: SocketRawStream) -> int:
    return len(await wire.wait())


# ---- input ----


async def test_input_and_its_end(engine: DockerEngine, box: str) -> None:
    async with session_of(engine, box, shell("cat; echo after >&2; exit 5", stdin=True)) as session:
        await session.write(b"one ")
        await session.write(b"")
        await session.write(b"two")
        await session.close_stdin()
        assert await all_of(session) == (b"one two", b"after\n")
        assert (await session.status()).exit_code == 5


@pytest.mark.deep
async def test_a_gigabyte_of_input_in_bounded_memory(engine: DockerEngine, box: str) -> None:
    block = bytes(range(256)) * 4096
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with session_of(engine, box, shell("wc -c", stdin=True)) as session:
        longest = 0.0
        for _ in range(1000):
            begun = time.monotonic()
            await session.write(block)
            longest = max(longest, time.monotonic() - begun)
        await session.close_stdin()
        out, _ = await all_of(session)
    assert int(out) == 1000 * len(block)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024, "KiB"


async def test_one_large_write_does_not_hold_up_the_loop(engine: DockerEngine, box: str) -> None:
    async with session_of(engine, box, shell("cat >/dev/null", stdin=True)) as session:
        writing = asyncio.create_task(session.write(bytes(200 * MIB)))
        turns = 0
        while not writing.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 100
        await session.close_stdin()
        await all_of(session)


@pytest.mark.parametrize("script", ["head -c 10; exit 4", "exec <&-; echo done; exit 4", "exit 4"])
async def test_input_that_nobody_reads_costs_no_output(engine: DockerEngine, box: str, script: str) -> None:
    async with session_of(engine, box, shell(f"head -c 300000 /dev/zero; {script}", stdin=True)) as session:
        writing = asyncio.create_task(session.write(b"x" * 10_000_000))
        out, _ = await all_of(session)
        assert len(out) >= 300_000
        await asyncio.wait_for(writing, limit(5))
        await session.write(b"more")
        await session.close_stdin()
        assert (await session.status()).exit_code == 4


# ---- terminals ----


async def test_terminal_with_its_size(engine: DockerEngine, box: str) -> None:
    # A shell heeds a trap when its child has ended.
    on_resize = "trap 'stty size; exit 9' WINCH"
    script = f"until [ \"$(stty size)\" = '33 101' ]; do :; done; {on_resize}; echo sized >&2; cat"
    async with session_of(
        engine, box, shell(script, tty=True, stdin=True, size=TerminalSize(columns=101, rows=33))
    ) as session:
        reader = session.read()
        heard = b""
        while b"sized" not in heard:
            stream, chunk = await anext(reader)
            assert stream is OUT, "a terminal has one output"
            heard += chunk
        await session.resize(TerminalSize(columns=120, rows=40))
        await session.close_stdin()
        async for _, chunk in reader:
            heard += chunk
        assert b"40 120" in heard
        assert (await session.status()).exit_code == 9
        await session.resize(TerminalSize(columns=1, rows=1))


@pytest.mark.parametrize("text", [b"hello\n", b"hello", b""])
async def test_the_end_of_a_terminals_input(engine: DockerEngine, box: str, text: bytes) -> None:
    async with session_of(engine, box, shell("stty -echo; echo ready; cat; exit 6", tty=True, stdin=True)) as session:
        reader = session.read()
        heard = b""
        while b"ready\r\n" not in heard:
            heard += (await anext(reader))[1]
        await session.write(text)
        await session.close_stdin()
        async for _, chunk in reader:
            heard += chunk
        assert heard == b"ready\r\n" + text.replace(b"\n", b"\r\n")
        assert (await session.status()).exit_code == 6


async def test_the_engines_detach_keys_reach_the_process(engine: DockerEngine, box: str) -> None:
    async with session_of(engine, box, shell("stty raw -echo; echo ready; head -c 2", tty=True, stdin=True)) as session:
        reader = session.read()
        heard = b""
        while b"ready" not in heard:
            heard += (await anext(reader))[1]
        await session.write(b"\x10\x11")
        async for _, chunk in reader:
            heard += chunk
        assert heard.endswith(b"\x10\x11")
        assert (await session.status()).exit_code == 0


# ---- what cannot be run ----


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (ExecRequest(("/nope",)), 127, "no such file or directory"),
        (ExecRequest(("nope",)), 127, "executable file not found in $PATH"),
        (ExecRequest(("/etc/passwd",)), 126, "permission denied"),
        (ExecRequest(("true",), working_dir="/nope"), 126, "chdir to cwd"),
        (ExecRequest(("true",), user="ghost"), 126, "unable to find user ghost"),
        (ExecRequest(("/nope",), tty=True, size=TerminalSize(columns=80, rows=24)), 127, "no such file or directory"),
    ],
)
async def test_what_cannot_be_run_says_why(
    engine: DockerEngine, box: str, request_: ExecRequest, code: int, says: str
) -> None:
    async with session_of(engine, box, request_) as session:
        assert await all_of(session) == (b"", b"")
        status = await session.status()
        assert says in status.start_error
        assert (status.exit_code, status.pid) == (code, 0)


async def test_a_process_that_ends_as_if_it_could_not_start(engine: DockerEngine, box: str) -> None:
    text = 'exec: "x": executable file not found\r\n'
    async with session_of(engine, box, shell(f"printf '{text}'; exit 126")) as session:
        assert await all_of(session) == (text.encode(), b"")
        status = await session.status()
        assert (status.exit_code, status.start_error) == (126, "")


async def test_where_nothing_can_be_run(engine: DockerEngine, box: str) -> None:
    await engine.pause(box)
    with pytest.raises(EngineRejected, match="paused") as refused:
        await engine.exec(box, shell("true"))
    assert refused.value.status == 409
    await engine.unpause(box)
    await engine.stop(box, 0)
    with pytest.raises(EngineRejected, match="not running") as refused:
        await engine.exec(box, shell("true"))
    assert refused.value.status == 409
    with pytest.raises(EngineRejected) as refused:
        await engine.exec("nonesuch", shell("true"))
    assert refused.value.status == 404
    with pytest.raises(EngineRejected) as refused:
        await engine.exec(box, ExecRequest(()))
    assert refused.value.status in (400, 409)


# ---- ends ----


async def pid_of(session: ExecSession) -> int:
    """The pid of its process; the engine may show the output before it shows that."""
    async with asyncio.timeout(limit(30)):
        while not (pid := (await session.status()).pid):
            await asyncio.sleep(0.01)
    return pid


async def test_signals(engine: DockerEngine, box: str, rig: Rig) -> None:
    processes = HostProcessControl()
    async with session_of(engine, box, shell("trap '' TERM; sleep 1000 & echo $!; wait; echo never")) as session:
        reader = session.read()
        await anext(reader)
        await pid_of(session)
        status = await session.status()
        assert status.running
        assert status.exit_code is None
        assert processes.alive(status.pid, box)
        assert not processes.alive(status.pid, "f" * 64), "a process of another container"
        assert not processes.signal(status.pid, "f" * 64, signal.SIGKILL, session=True)
        assert not processes.signal(rig.engine.pid, box, signal.SIGKILL), "a process of no container"
        assert processes.signal(status.pid, box, signal.SIGTERM)
        assert processes.signal(status.pid, box, signal.SIGKILL, session=True)
        async for _ in reader:
            pass
        assert await session.status() == ExecStatus(running=False, exit_code=137, pid=status.pid)
        assert not processes.alive(status.pid, box)
        assert not processes.signal(status.pid, box, signal.SIGKILL)
        # The child of the shell closes its output, which ends the stream, a moment before it is dead.
        await until(lambda: not processes.signal(status.pid, box, signal.SIGKILL, session=True))
    assert (await engine.inspect(box)).running  # type: ignore[union-attr]  # it exists
    for absurd in (0, -1, 1 << 40):
        assert not processes.alive(absurd, box)
        assert not processes.signal(absurd, box, signal.SIGKILL, session=True)
    assert not processes.alive(1, "")


def children_of(pid: int) -> list[int]:
    """The processes that a process with one thread has started, and that live."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_what_was_forked_has_begun_once_it_executes_a_program(engine: DockerEngine, box: str) -> None:
    processes = HostProcessControl()
    async with session_of(engine, box, shell("mkfifo /tmp/f; (read line < /tmp/f) & echo; wait")) as session:
        reader = session.read()
        await anext(reader)
        leader = await pid_of(session)
        assert processes.has_begun(leader, box)
        (child,) = children_of(leader)
        assert not processes.has_begun(child, box), "a shell that has forked, as runc's process before its program"
        assert processes.has_begun(child, "f" * 64), "a process of another container"
        assert processes.signal(leader, box, signal.SIGKILL, session=True)
        async for _ in reader:
            pass
        await until(lambda: processes.has_begun(child, box))


async def test_a_session_outlives_its_leader(engine: DockerEngine, box: str) -> None:
    """A process left by a command still has the session of its exited leader."""
    processes = HostProcessControl()
    async with session_of(engine, box, shell("sleep 1000 & echo; exit 0")) as session:
        reader = session.read()
        await anext(reader)
        pid = await pid_of(session)
        await until(lambda: not processes.alive(pid, box))
        assert processes.signal(pid, box, signal.SIGKILL, session=True)
        async for _ in reader:
            pass
        assert (await session.status()).exit_code == 0


async def test_closing_leaves_the_process_alone(engine: DockerEngine, box: str) -> None:
    session = await engine.exec(box, shell("sleep 1000"))
    reading = asyncio.create_task(all_of(session))
    pid = await started(session)
    await session.close()
    await session.close()
    assert await reading == (b"", b"")
    await session.write(b"into the void")
    assert await session.status() == ExecStatus(running=True, exit_code=None, pid=pid)
    assert HostProcessControl().signal(pid, box, signal.SIGKILL)


async def test_the_container_is_stopped_or_removed_meanwhile(engine: DockerEngine, box: str) -> None:
    async with (
        session_of(engine, box, shell("echo a; sleep 1000")) as first,
        session_of(engine, box, shell("echo b; sleep 1000", stdin=True)) as second,
    ):
        reader = second.read()
        assert await anext(reader) == (OUT, b"b\n")
        await engine.stop(box, 0)
        assert await all_of(first) == (b"a\n", b"")
        assert (await first.status()).exit_code == 137
        assert [chunk async for chunk in reader] == []
        await engine.remove(box)
        assert await second.status() == ExecStatus(running=False, exit_code=None, pid=0)


@pytest.mark.deep
async def test_a_dead_engine_is_no_end(box: str, engine_proxy: EngineProxy) -> None:
    async with connected_to(engine_proxy.url, timeout=3) as engine:
        for fault in (engine_proxy.faults.drop, engine_proxy.faults.hang):
            async with session_of(engine, box, shell("true")) as session:
                await all_of(session)
                fault("GET", "/exec/.*", times=None)
                with pytest.raises(EngineUnavailable):
                    await session.status()
                engine_proxy.faults.clear()
                assert (await session.status()).exit_code == 0


@pytest.mark.deep
@pytest.mark.parametrize("path", ["/containers/.*/exec", "/exec/.*/start"])
async def test_a_start_that_fails_hangs_or_is_dropped(box: str, engine_proxy: EngineProxy, path: str) -> None:
    async with connected_to(engine_proxy.url, timeout=2) as engine:
        engine_proxy.faults.drop("POST", path)
        with pytest.raises(EngineUnavailable):
            await engine.exec(box, shell("true"))
        engine_proxy.faults.fail("POST", path, status=500, message="broken")
        with pytest.raises(EngineRejected, match="broken"):
            await engine.exec(box, shell("true"))
        engine_proxy.faults.hang("POST", path)
        with pytest.raises(EngineUnavailable, match="timed out"):
            await engine.exec(box, shell("true"))
        hanging = engine_proxy.faults.hang("POST", path)
        starting = asyncio.create_task(engine.exec(box, shell("true")))
        await hanging.hit.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    await asyncio.wait_for(engine_proxy.idle(), limit(5))


# ---- over TCP, with and without TLS ----


@asynccontextmanager
async def relay(socket: Path, context: ssl.SSLContext | None) -> AsyncIterator[int]:
    """An engine's unix socket at a TCP port, as dockerd -H tcp:// would show it."""
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except ConnectionError:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(socket)
        try:
            sending = asyncio.create_task(pump(reader, inner_writer))
            await pump(inner_reader, writer)
            sending.cancel()
        finally:
            inner_writer.transport.abort()
            writer.close()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_over_tcp(box: str, rig: Rig) -> None:
    async with (
        relay(rig.engine.socket, None) as port,
        connected_to(f"tcp://127.0.0.1:{port}", timeout=30) as engine,
        session_of(engine, box, shell("cat; exit 3", stdin=True)) as session,
    ):
        writing = asyncio.create_task(session.write(b"x" * 1_000_000))
        reader = session.read()
        got = 0
        while got < 1_000_000:
            got += len((await anext(reader))[1])
        await writing
        await session.close_stdin()
        assert [chunk async for chunk in reader] == []
        assert (await session.status()).exit_code == 3


@pytest.fixture
def tls_folder(tmp_path: Path) -> Path:
    """ca.pem, cert.pem and key.pem that serve an engine and its client alike."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", str(tmp_path / "key.pem")]
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    certificate = ["-x509", "-out", str(tmp_path / "cert.pem")]
    subprocess.run(["openssl", "req", *key, *name, *certificate], check=True, capture_output=True)
    (tmp_path / "ca.pem").write_bytes((tmp_path / "cert.pem").read_bytes())
    return tmp_path


async def test_over_tls(box: str, rig: Rig, tls_folder: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls_folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tls_folder / "cert.pem", tls_folder / "key.pem")
    async with relay(rig.engine.socket, context) as port:
        url = f"tcp://127.0.0.1:{port}"
        with pytest.raises(EngineUnavailable):
            await DockerEngine.connect(url, timeout=5)
        request = shell("head -c 1000000; head -c 500000 /dev/zero >&2; exit 3", stdin=True)
        async with (
            connected_to(url, tls=tls_folder, timeout=30) as engine,
            session_of(engine, box, request) as session,
        ):
            writing = asyncio.create_task(session.write(b"x" * 1_000_000))
            out, err = await all_of(session)
            assert (len(out), len(err)) == (1_000_000, 500_000)
            await writing
            assert (await session.status()).exit_code == 3
            with pytest.raises(EngineRejected, match="TLS"):
                await session.close_stdin()
