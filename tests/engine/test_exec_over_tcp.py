"""DockerExecSession over TCP, with and without TLS."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.errors import EngineRejected, EngineUnavailable

from tests.engine.docker_fixtures import connect_engine, engine
from tests.engine.exec_sessions import box, open_session, read_all, shell_request
from tests.rig import Rig
from tests.rig.patience import limit

__all__ = ["box", "engine"]


@asynccontextmanager
async def tcp_relay(socket: Path, context: ssl.SSLContext | None) -> AsyncIterator[int]:
    """Relay a TCP port to an engine's unix socket, like dockerd -H tcp://; yields the port."""
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


async def test_an_exec_session_over_tcp(box: str, rig: Rig) -> None:
    async with (
        tcp_relay(rig.engine.socket, None) as port,
        connect_engine(f"tcp://127.0.0.1:{port}", timeout=limit(30)) as engine,
        open_session(engine, box, shell_request("cat; exit 3", stdin=True)) as session,
    ):
        writing = asyncio.create_task(session.write(b"x" * 1_000_000))
        reader = session.read()
        received = 0
        while received < 1_000_000:
            received += len((await anext(reader))[1])
        await writing
        await session.close_stdin()
        assert [chunk async for chunk in reader] == []
        assert (await session.status()).exit_code == 3


@pytest.fixture
def tls_folder(tmp_path: Path) -> Path:
    """A folder with ca.pem, cert.pem and key.pem for both an engine and its client."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", str(tmp_path / "key.pem")]
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    certificate = ["-x509", "-out", str(tmp_path / "cert.pem")]
    subprocess.run(["openssl", "req", *key, *name, *certificate], check=True, capture_output=True)
    (tmp_path / "ca.pem").write_bytes((tmp_path / "cert.pem").read_bytes())
    return tmp_path


async def test_an_exec_session_over_tls(box: str, rig: Rig, tls_folder: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls_folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tls_folder / "cert.pem", tls_folder / "key.pem")
    async with tcp_relay(rig.engine.socket, context) as port:
        url = f"tcp://127.0.0.1:{port}"
        with pytest.raises(EngineUnavailable):
            await DockerEngine.connect(url, timeout=5)
        request = shell_request("head -c 1000000; head -c 500000 /dev/zero >&2; exit 3", stdin=True)
        async with (
            connect_engine(url, tls=tls_folder, timeout=limit(30)) as engine,
            open_session(engine, box, request) as session,
        ):
            writing = asyncio.create_task(session.write(b"x" * 1_000_000))
            out, err = await read_all(session)
            assert (len(out), len(err)) == (1_000_000, 500_000)
            await writing
            assert (await session.status()).exit_code == 3
            with pytest.raises(EngineRejected, match="TLS"):
                await session.close_stdin()
