"""Each call to the engine in turn fails, hangs or loses its connection, before or after the engine executes it.

After each fault nothing is left over, and the container is as before or as requested, as the caller's result says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from gpudock.v1 import container_pb2

from tests.calls import Caller, failure_of
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, require_absent, require_consistent
from tests.rig import Daemon, EngineProxy, Fault, Rig
from tests.rig.patience import limit

pytestmark = pytest.mark.deep

_PORT = container_pb2.PortRequest(container_port=80)
# Prefixes of the names of images that a commit makes and removes.
_INTERMEDIATE_IMAGES = ("gpudock/raw:", "gpudock/commit:")
_CALLS = r"/(commit|containers|images|volumes)(/.*)?"
# Without waits, which change nothing.
_MUTATIONS = r"/(commit|containers|images|volumes)(/(?!.*/wait$).*)?"
_MOST_CALLS = 60
# The reasons of errors that a caller may get: the engine is unavailable, it refused a call, or a step failed by that.
_REASONS = {"ENGINE_UNAVAILABLE", "ENGINE_REJECTED", "START_FAILED", "LAYER_CARRY_FAILED", "IMAGE_NOT_FOUND"}

InjectFault = Callable[[EngineProxy, int], Fault]

FAULTS: dict[str, InjectFault] = {
    "refused": lambda proxy, nth: proxy.faults.fail(".*", _CALLS, nth=nth),
    "refused, but done": lambda proxy, nth: proxy.faults.fail("POST|DELETE", _MUTATIONS, nth=nth, after=True),
    "hangs": lambda proxy, nth: proxy.faults.hang(".*", _CALLS, nth=nth),
    "hangs, but done": lambda proxy, nth: proxy.faults.hang("POST|DELETE", _MUTATIONS, nth=nth, after=True),
    "dropped": lambda proxy, nth: proxy.faults.drop(".*", _CALLS, nth=nth),
    "dropped, but done": lambda proxy, nth: proxy.faults.drop("POST|DELETE", _MUTATIONS, nth=nth, after=True),
}


@asynccontextmanager
async def _daemon_behind(rig: Rig, proxy: EngineProxy, kind: str) -> AsyncIterator[tuple[Daemon, Caller]]:
    # A hanging call is waited for until this timeout; without one, a slow engine must not be taken for a hanging one.
    timeout = f"{limit(2.5 if 'hangs' in kind else 20):g}"
    daemon = await rig.start_daemon(*FAST_FLAGS, *own_state_flags(), "--engine-timeout", timeout, docker_host=proxy.url)
    try:
        async with Caller(daemon.target) as caller:
            yield daemon, caller
    finally:
        proxy.faults.clear()
        await asyncio.to_thread(daemon.stop)


async def _fail_each_call(
    proxy: EngineProxy, inject: InjectFault, act: Callable[[], Awaitable[object]]
) -> AsyncIterator[str]:
    """Run `act` with a fault in call 1, then in call 2, until it is not hit; yields each error's reason or ""."""
    for nth in range(1, _MOST_CALLS):
        fault = inject(proxy, nth)
        reason = ""
        try:
            await act()
        except grpc.aio.AioRpcError as error:
            failure = failure_of(error)
            reason = failure.reason
            assert reason in _REASONS, failure
        hit = fault.hit.is_set()
        proxy.faults.clear()
        yield reason
        if not hit:
            return
    raise AssertionError(f"more than {_MOST_CALLS} calls of the engine")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", FAULTS)
async def test_create_with_a_fault_in_each_engine_call(clean_engine: Rig, engine_proxy: EngineProxy, kind: str) -> None:
    rig = clean_engine
    async with _daemon_behind(rig, engine_proxy, kind) as (_, caller):
        outcomes = []

        async def create() -> None:
            await caller.create("subject", 2, ports=[_PORT])

        async for reason in _fail_each_call(engine_proxy, FAULTS[kind], create):
            outcomes.append(reason)
            await caller.until_idle()
            if reason:
                await require_absent(caller, rig, "subject")
                assert await caller.free_gpus() == 8
            else:
                await require_consistent(caller, rig, "subject")
                await caller.delete("subject")
        assert any(outcomes)
        assert outcomes[-1] == ""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", FAULTS)
async def test_scale_with_a_fault_in_each_engine_call(clean_engine: Rig, engine_proxy: EngineProxy, kind: str) -> None:
    rig = clean_engine
    async with _daemon_behind(rig, engine_proxy, kind) as (_, caller):
        await caller.create("subject", 2, ports=[_PORT])
        await caller.shell("subject", WRITE_FILES)
        files = await caller.shell("subject", SHOW_FILES)
        count = 2
        outcomes = []

        async def scale() -> None:
            await caller.scale("subject", 5 - count)

        async for reason in _fail_each_call(engine_proxy, FAULTS[kind], scale):
            outcomes.append(reason)
            await caller.until_idle()
            count = count if reason else 5 - count
            container = await require_consistent(caller, rig, "subject", files)
            assert container.spec.gpus.count == count, "the result differs from what happened"
        assert any(outcomes)
        assert outcomes[-1] == ""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["refused", "refused, but done", "dropped", "dropped, but done"])
async def test_commit_with_a_fault_in_each_engine_call(clean_engine: Rig, engine_proxy: EngineProxy, kind: str) -> None:
    """The name is that of the old image, or of the image in the result; no other image is left."""
    rig = clean_engine
    async with _daemon_behind(rig, engine_proxy, kind) as (_, caller):
        await caller.create("subject", 2, ports=[_PORT])
        before = (await caller.commit("subject", "gpudock/subject", tag="test")).id
        # Daemons of other tests, killed during a commit, may have left images.
        others = rig.engine.image_ids()
        outcomes = []
        made = ""

        async def commit() -> None:
            nonlocal made
            made = ""
            made = (await caller.commit("subject", "gpudock/subject", tag="test")).id

        async for reason in _fail_each_call(engine_proxy, FAULTS[kind], commit):
            outcomes.append(reason)
            await caller.until_idle()
            await require_consistent(caller, rig, "subject")
            images = rig.engine.image_ids()
            assert images["gpudock/subject:test"] == (made or before), reason
            assert not [tag for tag in images if tag.startswith(_INTERMEDIATE_IMAGES) and tag not in others], reason
            before = made or before
        assert any(outcomes)
        assert outcomes[-1] == ""
    rig.engine.call("DELETE", "/images/gpudock/subject:test")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["refused", "hangs, but done", "dropped"])
async def test_clone_with_a_fault_in_each_engine_call(clean_engine: Rig, engine_proxy: EngineProxy, kind: str) -> None:
    rig = clean_engine
    async with _daemon_behind(rig, engine_proxy, kind) as (_, caller):
        await caller.create("source", 2, ports=[_PORT])
        await caller.shell("source", WRITE_FILES)
        files = await caller.shell("source", SHOW_FILES)
        outcomes = []

        async def clone() -> None:
            await caller.clone("source", "subject")

        async for reason in _fail_each_call(engine_proxy, FAULTS[kind], clone):
            outcomes.append(reason)
            await caller.until_idle()
            await require_consistent(caller, rig, "source", files)
            if reason:
                await require_absent(caller, rig, "subject")
                assert await caller.free_gpus() == 6
            else:
                await require_consistent(caller, rig, "subject", files)
                await caller.delete("subject")
        assert any(outcomes)
        assert outcomes[-1] == ""
