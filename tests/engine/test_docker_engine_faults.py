"""DockerEngine on an engine that fails, hangs, disconnects, or has an unsupported API version."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.errors import (
    EngineRejected,
    EngineUnavailable,
    ImagePullFailed,
    StartFailed,
)

from tests.calls import IMAGE
from tests.engine.docker_fixtures import (
    connect_engine,
    connections_in_use,
    direct_engine,
    engine,
)
from tests.engine.engine_examples import engine_spec
from tests.rig import EngineProxy
from tests.rig.patience import limit

__all__ = ["direct_engine", "engine"]


def _ignore_progress(_current: int, _total: int) -> None:
    pass


EngineCall = Callable[[DockerEngine, str], Awaitable[object]]
CALLS: dict[str, EngineCall] = {
    "info": lambda engine, _: engine.info(),
    "image": lambda engine, _: engine.image(IMAGE),
    "inspect_volume": lambda engine, _: engine.inspect_volume("v"),
    "remove_volume": lambda engine, _: engine.remove_volume("v"),
    "inspect": lambda engine, box: engine.inspect(box),
    "find": lambda engine, _: engine.find({"gpudock.uid": ""}),
    "start": lambda engine, box: engine.start(box),
    "stop": lambda engine, box: engine.stop(box, 0),
    "pause": lambda engine, box: engine.pause(box),
    "update": lambda engine, box: engine.update(box, cpus=1, memory_bytes=0),
    "exited_within": lambda engine, box: engine.exited_within(box, 0.2),
    "remove": lambda engine, box: engine.remove(box),
    "pull": lambda engine, _: engine.pull("127.0.0.1:1/x", None, _ignore_progress),
}


@pytest.mark.parametrize("name", CALLS)
async def test_every_call_ends_and_leaks_nothing(
    direct_engine: DockerEngine, engine_proxy: EngineProxy, name: str
) -> None:
    call, faults = CALLS[name], engine_proxy.faults
    async with connect_engine(engine_proxy.url, timeout=limit(0.5)) as engine:
        box = await direct_engine.create(await engine_spec(direct_engine))

        faults.drop(".*", ".*", times=None)
        with pytest.raises(EngineUnavailable):
            await call(engine, box)
        faults.clear()

        faults.fail(".*", ".*", status=500, message="broken", times=None)
        with pytest.raises((EngineRejected, StartFailed, ImagePullFailed), match="broken"):
            await call(engine, box)
        faults.clear()

        faults.hang(".*", ".*", times=None)
        with pytest.raises(EngineUnavailable, match="timed out"):
            await call(engine, box)
        faults.clear()

        hanging = faults.hang(".*", ".*", times=None)
        task = asyncio.create_task(_as_coroutine(call(engine, box)))
        await hanging.hit.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert connections_in_use(engine) == 0
        faults.clear()
    await asyncio.wait_for(engine_proxy.idle(), limit(5))


async def _as_coroutine(awaitable: Awaitable[object]) -> None:
    await awaitable


async def test_an_invalid_response_is_an_unavailable_engine(tmp_path: Path) -> None:
    responses = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n{}",
    ]

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(responses[0])
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    while responses:
        with pytest.raises(EngineUnavailable):
            await DockerEngine.connect(f"unix://{tmp_path}/s", timeout=2)
        responses.pop(0)
    server.close()
    with pytest.raises(EngineUnavailable):
        await DockerEngine.connect(f"unix://{tmp_path}/none", timeout=2)


@pytest.mark.parametrize(
    ("newest", "oldest", "agreed"),
    [("1.40", "1.12", "1.40"), ("1.52", "1.44", "1.47"), ("1.39", "1.12", None), ("1.60", "1.48", None)],
)
async def test_the_newest_common_api_version_is_used(
    tmp_path: Path, newest: str, oldest: str, agreed: str | None
) -> None:
    targets: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            targets.append(head.split()[1].decode())
            while (await reader.readline()).strip():
                pass
            body = json.dumps({"ApiVersion": newest, "MinAPIVersion": oldest, "ID": "x"}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    url = f"unix://{tmp_path}/s"
    if agreed is None:
        with pytest.raises(EngineRejected, match="update the older one"):
            await DockerEngine.connect(url, timeout=2)
    else:
        engine = await DockerEngine.connect(url, timeout=limit(2))
        assert (await engine.info()).api_version == agreed
        assert targets[-1] == f"/v{agreed}/info"
        await engine.close()
    server.close()
