"""DockerEngine on a real engine: the stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.errors import (
    EngineUnavailable,
)
from gpudock_server.model.engine import (
    EngineEvent,
    EngineEventKind,
)

from tests.engine.conditions import until_true
from tests.engine.docker_fixtures import (
    connect_engine,
    direct_engine,
    engine,
    labels_without_spec,
)
from tests.engine.engine_examples import start_container
from tests.rig import EngineProxy
from tests.rig.patience import limit

__all__ = ["direct_engine", "engine"]


async def next_event(stream: AsyncIterator[EngineEvent]) -> EngineEvent:
    return await anext(stream)


async def close_events(stream: AsyncIterator[EngineEvent]) -> None:
    await stream.aclose()  # type: ignore[attr-defined]  # an async generator; the protocol has only AsyncIterator


async def read_until_destroyed(stream: AsyncIterator[EngineEvent]) -> list[EngineEvent]:
    """The events up to the removal of a container, each once: the engine may repeat those at the start of a stream."""
    events: list[EngineEvent] = []
    while not events or events[-1].kind is not EngineEventKind.DESTROY:
        event = await anext(stream)
        if event not in events:
            events.append(event)
    return events


async def test_a_stream_of_events_resumes_at_a_time(engine: DockerEngine) -> None:
    begun = time.time_ns()
    box = await start_container(engine)
    stream = engine.events(begun)
    started = await anext(stream)
    assert (started.kind, started.engine_id) == (EngineEventKind.START, box)
    assert labels_without_spec(started.labels) == {
        "gpudock.uid": "uid-box",
        "gpudock.name": "box",
        "gpudock.operation": "op1",
    }
    await engine.pause(box)
    await engine.unpause(box)
    await engine.update(box, cpus=1, memory_bytes=0)
    await engine.remove(box)
    kinds = [
        EngineEventKind.START,
        EngineEventKind.PAUSE,
        EngineEventKind.UNPAUSE,
        EngineEventKind.UPDATE,
        EngineEventKind.DIE,
        EngineEventKind.DESTROY,
    ]
    events = [started, *await read_until_destroyed(stream)]
    assert [event.kind for event in events] == kinds
    from_start = engine.events(started.time_nanos)
    assert await read_until_destroyed(from_start) == events
    from_third = engine.events(events[2].time_nanos)
    assert await anext(from_third) == events[2]
    for opened in (stream, from_start, from_third):
        await close_events(opened)


async def test_the_stream_of_events_fails_when_the_engine_disconnects(engine_proxy: EngineProxy) -> None:
    async with connect_engine(engine_proxy.url, timeout=limit(5)) as engine:
        listening = asyncio.create_task(next_event(engine.events(0)))

        def statuses() -> list[int | None]:
            return [request.engine_status for request in engine_proxy.requests if request.path == "/events"]

        await until_true(lambda: statuses() == [200], "the stream of events is open")
        for connection in list(engine_proxy._connections):
            connection.cancel()
        with pytest.raises(EngineUnavailable):
            await listening
        engine_proxy.faults.drop("GET", "/events", times=None)
        with pytest.raises(EngineUnavailable):
            await next_event(engine.events(0))


async def test_an_idle_stream_of_events_fails_when_the_engine_does_not_respond(
    engine_proxy: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpudock_server.adapters.docker.connection._SILENCE_SECONDS", 0.1)
    async with connect_engine(engine_proxy.url, timeout=limit(1)) as engine:
        listening = asyncio.create_task(next_event(engine.events(0)))

        def pings() -> int:
            return sum(request.path == "/version" for request in engine_proxy.requests)

        await until_true(lambda: pings() >= 4, "the engine is called while it sends no events")
        assert not listening.done(), "the stream ended although the engine responds"
        engine_proxy.faults.hang("GET", "/version", times=None)
        with pytest.raises(EngineUnavailable):
            await listening
