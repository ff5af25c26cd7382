"""ExecContainer: the end of a process after a disconnect, a timeout, or a stop of its container, daemon or engine."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.calls import Caller, failure_of
from tests.engine.conditions import until_true
from tests.engine.exec_calls import (
    BOX,
    ExecCall,
    connect_with_container,
    duration,
    exec_caller,
    shell,
    sleep_pids,
    until_sleeps_end,
    unused_sleep_seconds,
)
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.rig import Daemon, EngineProxy, Rig
from tests.rig.patience import limit

__all__ = ["daemons", "exec_caller"]


async def test_a_disconnect_ends_the_processes_of_the_session_and_no_others(daemons: IsolatedDaemons) -> None:
    ignores_hup, other_session, handles_hup = (next(unused_sleep_seconds) for _ in range(3))
    script = (
        f"setsid sleep {other_session} & (trap '' HUP; exec sleep {ignores_hup}) &"
        f" (trap 'usleep 200000; echo cleaned > /cleaned; exit' HUP; sleep {handles_hup} & wait) &"
        " echo ready; wait"
    )
    daemon = await daemons.start("--exec-hangup-grace", f"{limit(1):.1f}")
    async with connect_with_container(daemon) as caller:
        call = await ExecCall(caller, *shell(script)).begin()
        await call.wait_for_output(b"ready\n")
        sleeps = (ignores_hup, other_session, handles_hup)
        await until_true(lambda: all(map(sleep_pids, sleeps)), "all processes run")
        call.rpc.cancel()
        await until_sleeps_end(ignores_hup, handles_hup)
        assert await caller.shell(BOX, "cat /cleaned") == "cleaned\n", "the child processes had no grace period"
        (survivor,) = sleep_pids(other_session)
        os.kill(survivor, signal.SIGKILL)


@pytest.mark.deep
async def test_the_deadline_of_a_call_ends_the_process(exec_caller: Caller) -> None:
    number = next(unused_sleep_seconds)
    call = await ExecCall(exec_caller, "sleep", str(number), deadline=limit(3)).begin()
    await until_true(lambda: sleep_pids(number), "the process runs")
    assert (await call.wait_for_failure()).code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until_sleeps_end(number)


async def test_a_timeout_sends_sigterm_first(exec_caller: Caller) -> None:
    script = "trap 'echo bye; exit 5' TERM; while :; do usleep 10000; done"
    result = await exec_caller.run(BOX, *shell(script), timeout=duration(limit(1)))
    assert (result.stdout, result.code, result.timed_out) == (b"bye\n", 5, True)


async def test_a_timeout_kills_a_process_that_ignores_sigterm(exec_caller: Caller) -> None:
    script = "trap '' TERM; while :; do usleep 10000; done"
    result = await exec_caller.run(BOX, *shell(script), timeout=duration(limit(1)))
    assert (result.signal, result.timed_out) == ("SIGKILL", True)


async def test_a_timeout_kills_children_whose_parent_has_ended(exec_caller: Caller) -> None:
    number = next(unused_sleep_seconds)
    script = f"(trap '' TERM; exec sleep {number} >/dev/null 2>&1 </dev/null) & echo ready; wait"
    result = await exec_caller.run(BOX, *shell(script), timeout=duration(1))
    assert (result.signal, result.timed_out) == ("SIGTERM", True)
    await until_sleeps_end(number)


async def test_a_command_that_ends_before_its_timeout_keeps_its_exit_code(exec_caller: Caller) -> None:
    result = await exec_caller.run(BOX, *shell("exit 3"), timeout=duration(60))
    assert (result.code, result.timed_out) == (3, False)


@pytest.mark.parametrize("how", ["stop", "delete"])
async def test_a_stop_or_delete_of_the_container_ends_the_process(exec_caller: Caller, how: str) -> None:
    call = await ExecCall(exec_caller, *shell("echo ready; exec sleep 1000")).begin()
    await call.wait_for_output(b"ready\n")
    await (exec_caller.stop(BOX) if how == "stop" else exec_caller.delete(BOX))
    # The engine may or may not report the exit of the process; it never reports exit code 0.
    try:
        assert (await call.wait_for_end()).signal == "SIGKILL"
    except grpc.aio.AioRpcError as error:
        assert failure_of(error).reason == "CONTAINER_NOT_RUNNING"  # noqa: PT017 - both ends are correct


async def test_a_stopping_daemon_ends_the_processes_of_its_execs(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    numbers = [next(unused_sleep_seconds) for _ in range(3)]
    async with connect_with_container(daemon) as caller:
        calls = [await ExecCall(caller, "sleep", str(number)).begin() for number in numbers]
        await until_true(lambda: all(map(sleep_pids, numbers)), "the processes run")
        daemon.terminate()
        for call in calls:
            error = await call.wait_for_failure()
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert await asyncio.to_thread(daemon.wait) == 0
    assert not any(map(sleep_pids, numbers))


@pytest.mark.deep
async def test_a_disconnect_at_any_moment_leaves_no_process(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    numbers = [next(unused_sleep_seconds) for _ in range(24)]
    async with connect_with_container(daemon) as caller:
        for delay, number in enumerate(numbers):
            call = ExecCall(caller, "sleep", str(number))
            beginning = asyncio.create_task(call.begin())
            await asyncio.wait([beginning], timeout=delay * 0.004)
            call.rpc.cancel()
            # grpc.aio may wait forever for a message that it never sent.
            beginning.cancel()
            await asyncio.gather(beginning, return_exceptions=True)
        # The daemon exits after it has ended all processes that it started.
        assert await asyncio.to_thread(daemon.stop) == 0
    assert not any(map(sleep_pids, numbers))


@pytest.mark.deep
async def test_two_hundred_execs_leak_no_descriptor_and_no_slot(daemons: IsolatedDaemons) -> None:
    """Forty execs of each kind, eight at a time."""
    slots = 12
    daemon = await daemons.start("--max-execs", str(slots))
    async with connect_with_container(daemon) as caller:
        await _run_eight_execs(caller, "ends")
        before = await _idle_descriptors(caller, daemon, slots)
        for kind in (
            "ends",
            "cannot be run",
            "cancelled without output",
            "cancelled during output",
            "cancelled at once",
        ):
            for _ in range(5):
                await _run_eight_execs(caller, kind)
            # The connection pool may have a few connections more or less, and on a busy machine many more until they
            # have been idle for 15 s; a leak of one descriptor for each exec would add forty.
            await _idle_descriptors(caller, daemon, slots)
            await until_true(lambda: _descriptors(daemon) < before + 12, kind)
    assert await asyncio.to_thread(daemon.stop) == 0
    assert "never retrieved" not in daemon.log_text
    assert "Traceback" not in daemon.log_text, daemon.log_text


async def _run_eight_execs(caller: Caller, kind: str) -> None:
    for outcome in await asyncio.gather(*(_run_exec(caller, kind) for _ in range(8)), return_exceptions=True):
        if isinstance(outcome, grpc.aio.AioRpcError):
            # Execs of the round before may not have ended yet.
            assert failure_of(outcome).reason == "EXEC_LIMIT"
        elif outcome is not None:
            raise outcome


async def _run_exec(caller: Caller, kind: str) -> None:
    match kind:
        case "ends":
            assert (await caller.run(BOX, "cat", stdin=b"x" * 100_000)).code == 0
        case "cannot be run":
            assert (await caller.run(BOX, "nosuch")).code == 127
        case "cancelled without output":
            call = await ExecCall(caller, "sleep", "1000").begin()
            call.rpc.cancel()
        case "cancelled during output":
            call = await ExecCall(caller, *shell("echo ready; exec cat /dev/zero")).begin()
            await call.wait_for_output(b"ready\n")
            call.rpc.cancel()
        case "cancelled at once":
            call = ExecCall(caller, "sleep", "1000", tty=True, stdin=True)
            await call.send_start()
            call.rpc.cancel()


async def _idle_descriptors(caller: Caller, daemon: Daemon, slots: int) -> int:
    """The number of the daemon's open descriptors after every slot was free, used, and free again."""
    calls: list[ExecCall] = []
    async with asyncio.timeout(limit(60)):
        while len(calls) < slots:
            try:
                calls.append(await ExecCall(caller, "cat", stdin=True).begin())
            except grpc.aio.AioRpcError as error:
                assert failure_of(error).reason == "EXEC_LIMIT"  # noqa: PT017 - the calls are repeated until this ends
                await asyncio.sleep(0.05)
    for call in calls:
        await call.rpc.done_writing()
        await call.wait_for_end()
    return _descriptors(daemon)


def _descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


@pytest.mark.deep
async def test_a_process_whose_engine_failed_is_ended_when_the_engine_returns(
    daemons: IsolatedDaemons, rig: Rig
) -> None:
    number = next(unused_sleep_seconds)
    proxy = rig.engine_proxy()
    async with AsyncExitStack() as stack:
        async with proxy:
            daemon = await daemons.start(docker_host=proxy.url)
            caller = await stack.enter_async_context(connect_with_container(daemon))
            call = await ExecCall(caller, "sleep", str(number)).begin()
            await until_true(lambda: sleep_pids(number), "the process runs")
        error = await call.wait_for_failure()
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")
        assert sleep_pids(number)
        async with EngineProxy(rig.engine.socket, proxy.path):
            await until_sleeps_end(number)
            await asyncio.to_thread(daemon.stop)
