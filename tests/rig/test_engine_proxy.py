"""The engine proxy forwards everything unchanged, except the requests that a fault applies to."""

import asyncio
import contextlib
import io
import tarfile
from collections.abc import AsyncIterator
from typing import Any, cast

import aiodocker
import aiohttp
import pytest
import pytest_asyncio
from aiodocker.containers import DockerContainer

from tests.rig import BUSYBOX, EngineProxy

from .patience import limit

SLEEPER = {"Image": BUSYBOX, "Cmd": ["sleep", "1000"], "StopSignal": "SIGKILL"}


@pytest_asyncio.fixture
async def client(engine_proxy: EngineProxy) -> AsyncIterator[aiodocker.Docker]:
    """An aiodocker client of the proxy."""
    async with aiodocker.Docker(url=engine_proxy.url) as docker:
        yield docker


async def _start_container(client: aiodocker.Docker) -> DockerContainer:
    container = await client.containers.create(SLEEPER)
    await container.start()
    return container


async def _state(docker: aiodocker.Docker, container: DockerContainer) -> str:
    answer = await docker.containers.container(container.id).show()
    return str(answer["State"]["Status"])


async def test_requests_are_forwarded_unchanged_and_recorded(
    client: aiodocker.Docker, engine_proxy: EngineProxy
) -> None:
    container = await _start_container(client)
    events = cast("Any", client.events).subscribe()  # aiodocker has no types for it
    await container.kill()
    await container.wait()
    assert (await events.get()) is not None
    recorded = [(request.method, request.path, request.status) for request in engine_proxy.requests if request.mutates]
    start = f"/containers/{container.id}"
    assert recorded[:3] == [
        ("POST", "/containers/create", 201),
        ("POST", f"{start}/start", 204),
        ("POST", f"{start}/kill", 204),
    ]


async def test_hijacked_streams_and_archives_are_forwarded(client: aiodocker.Docker) -> None:
    container = await _start_container(client)
    execution = await container.exec(["sh", "-c", "cat; echo error >&2; exit 7"], stdin=True)
    async with execution.start() as stream:
        sent = bytes(range(256)) * 4096
        writer = asyncio.create_task(_send_all(stream, sent))
        received = {1: b"", 2: b""}
        while message := await stream.read_out():
            received[message.stream] += message.data
        await writer
    assert received == {1: sent, 2: b"error\n"}
    assert (await execution.inspect())["ExitCode"] == 7

    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        entry = tarfile.TarInfo("big")
        entry.size = 900_000
        archive.addfile(entry, io.BytesIO(b"x" * entry.size))
    await cast("Any", container).put_archive("/tmp", tar.getvalue())
    back = await container.get_archive("/tmp/big")
    member = back.extractfile("big")
    assert member is not None
    assert member.read() == b"x" * (900_000)


async def _send_all(stream: aiodocker.stream.Stream, data: bytes) -> None:
    await stream.write_in(data)
    assert stream._resp is not None
    connection = stream._resp.connection
    assert connection is not None
    assert connection.transport is not None
    connection.transport.write_eof()  # aiodocker cannot half-close a connection


async def test_the_nth_request_fails_before_the_engine_gets_it(
    client: aiodocker.Docker, docker: aiodocker.Docker, engine_proxy: EngineProxy
) -> None:
    fault = engine_proxy.faults.fail("POST", "/containers/[^/]+/start", status=503, message='no "space"', nth=2)
    first, second = [await client.containers.create(SLEEPER) for _ in range(2)]
    await first.start()
    with pytest.raises(aiodocker.DockerError, match='no "space"') as raised:
        await second.start()
    assert raised.value.status == 503
    assert fault.hit.is_set()
    assert await _state(docker, second) == "created"
    await second.start()
    faulty = [request for request in engine_proxy.requests if request.fault]
    assert [(request.engine_status, request.status) for request in faulty] == [(None, 503)]


async def test_a_request_fails_after_the_engine_has_executed_it(
    client: aiodocker.Docker, docker: aiodocker.Docker, engine_proxy: EngineProxy
) -> None:
    container = await client.containers.create(SLEEPER)
    engine_proxy.faults.fail("POST", ".*/start", after=True)
    with pytest.raises(aiodocker.DockerError, match="injected"):
        await container.start()
    assert await _state(docker, container) == "running"
    assert (engine_proxy.requests[-1].engine_status, engine_proxy.requests[-1].status) == (204, 500)


@pytest.mark.parametrize(("after", "state"), [(False, "created"), (True, "running")])
async def test_a_connection_is_closed_before_or_after_the_engine_executes_the_request(
    client: aiodocker.Docker, docker: aiodocker.Docker, engine_proxy: EngineProxy, *, after: bool, state: str
) -> None:
    container = await client.containers.create(SLEEPER)
    engine_proxy.faults.drop("POST", ".*/start", after=after)
    with pytest.raises((aiohttp.ClientError, aiodocker.DockerError)):
        await container.start()
    assert await _state(docker, container) == state


@pytest.mark.parametrize(("after", "state"), [(False, "created"), (True, "running")])
async def test_a_request_hangs_until_it_is_released(
    client: aiodocker.Docker, docker: aiodocker.Docker, engine_proxy: EngineProxy, *, after: bool, state: str
) -> None:
    container = await client.containers.create(SLEEPER)
    fault = engine_proxy.faults.hang("POST", ".*/start", after=after)
    start = asyncio.create_task(container.start())
    await asyncio.wait_for(fault.hit.wait(), limit(10))
    assert await _state(docker, container) == state
    assert not start.done()
    fault.release()
    await asyncio.wait_for(start, limit(10))
    assert await _state(docker, container) == "running"


async def test_a_hanging_request_is_dropped_when_its_client_disconnects(
    client: aiodocker.Docker, docker: aiodocker.Docker, engine_proxy: EngineProxy
) -> None:
    container = await client.containers.create(SLEEPER)
    fault = engine_proxy.faults.hang("POST", ".*/start")
    start = asyncio.create_task(container.start())
    await asyncio.wait_for(fault.hit.wait(), limit(10))
    start.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await start
    await client.close()
    await asyncio.wait_for(engine_proxy.idle(), limit(10))
    fault.release()
    assert await _state(docker, container) == "created"
