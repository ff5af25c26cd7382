"""DockerExecSession on a real engine: starts that fail, signals, exits, and an engine that is unavailable."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.host.processes import HostProcessControl
from gpudock_server.errors import EngineRejected, EngineUnavailable
from gpudock_server.model.engine import ExecRequest, ExecStatus, TerminalSize

from tests.engine.conditions import until_true
from tests.engine.docker_fixtures import connect_engine, engine
from tests.engine.engine_examples import inspect_container
from tests.engine.exec_sessions import OUT, box, open_session, read_all, shell_request, wait_for_pid
from tests.rig import EngineProxy, Rig
from tests.rig.patience import limit

__all__ = ["box", "engine"]


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (ExecRequest(("/nope",)), 127, "no such file or directory"),
        (ExecRequest(("nope",)), 127, "executable file not found in $PATH"),
        (ExecRequest(("/etc/passwd",)), 126, "permission denied"),
        (ExecRequest(("true",), working_dir="/nope"), 126, "chdir to cwd"),
        (ExecRequest(("true",), user="absent"), 126, "unable to find user absent"),
        (ExecRequest(("/nope",), tty=True, size=TerminalSize(columns=80, rows=24)), 127, "no such file or directory"),
    ],
)
async def test_a_process_that_cannot_start_has_a_start_error(
    engine: DockerEngine, box: str, request_: ExecRequest, code: int, message: str
) -> None:
    async with open_session(engine, box, request_) as session:
        assert await read_all(session) == (b"", b"")
        status = await session.status()
        assert message in status.start_error
        assert (status.exit_code, status.pid) == (code, 0)


async def test_a_process_that_ends_as_if_it_could_not_start(engine: DockerEngine, box: str) -> None:
    text = 'exec: "x": executable file not found\r\n'
    async with open_session(engine, box, shell_request(f"printf '{text}'; exit 126")) as session:
        assert await read_all(session) == (text.encode(), b"")
        status = await session.status()
        assert (status.exit_code, status.start_error) == (126, "")


async def test_an_exec_needs_a_running_container(engine: DockerEngine, box: str) -> None:
    await engine.pause(box)
    with pytest.raises(EngineRejected, match="paused") as refused:
        await engine.exec(box, shell_request("true"))
    assert refused.value.status == 409
    await engine.unpause(box)
    await engine.stop(box, 0)
    with pytest.raises(EngineRejected, match="not running") as refused:
        await engine.exec(box, shell_request("true"))
    assert refused.value.status == 409
    with pytest.raises(EngineRejected) as refused:
        await engine.exec("nonesuch", shell_request("true"))
    assert refused.value.status == 404
    with pytest.raises(EngineRejected) as refused:
        await engine.exec(box, ExecRequest(()))
    assert refused.value.status in (400, 409)


async def test_signals_reach_only_processes_of_the_container(engine: DockerEngine, box: str, rig: Rig) -> None:
    processes = HostProcessControl()
    async with open_session(
        engine, box, shell_request("trap '' TERM; sleep 1000 & echo $!; wait; echo never")
    ) as session:
        reader = session.read()
        await anext(reader)
        await wait_for_pid(session)
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
        # The stream ends when the child of the shell closes its output, a moment before the child is dead.
        await until_true(
            lambda: not processes.signal(status.pid, box, signal.SIGKILL, session=True), "the session has no process"
        )
    assert (await inspect_container(engine, box)).running
    for invalid in (0, -1, 1 << 40):
        assert not processes.alive(invalid, box)
        assert not processes.signal(invalid, box, signal.SIGKILL, session=True)
    assert not processes.alive(1, "")


def children_of(pid: int) -> list[int]:
    """The running child processes of a process with one thread."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_forked_process_has_begun_when_it_executes_a_program(engine: DockerEngine, box: str) -> None:
    processes = HostProcessControl()
    async with open_session(engine, box, shell_request("mkfifo /tmp/f; (read line < /tmp/f) & echo; wait")) as session:
        reader = session.read()
        await anext(reader)
        leader = await wait_for_pid(session)
        assert processes.has_begun(leader, box)
        (child,) = children_of(leader)
        # The child is a fork of the shell that has executed no program, like runc's process before its exec.
        assert not processes.has_begun(child, box)
        assert processes.has_begun(child, "f" * 64), "a process of another container"
        assert processes.signal(leader, box, signal.SIGKILL, session=True)
        async for _ in reader:
            pass
        await until_true(lambda: processes.has_begun(child, box), "the child has ended")


async def test_a_session_remains_after_its_leader_has_exited(engine: DockerEngine, box: str) -> None:
    """A background process of a command keeps the session of its exited leader."""
    processes = HostProcessControl()
    async with open_session(engine, box, shell_request("sleep 1000 & echo; exit 0")) as session:
        reader = session.read()
        await anext(reader)
        pid = await wait_for_pid(session)
        await until_true(lambda: not processes.alive(pid, box), "the leader has exited")
        assert processes.signal(pid, box, signal.SIGKILL, session=True)
        async for _ in reader:
            pass
        assert (await session.status()).exit_code == 0


async def test_closing_a_session_does_not_end_its_process(engine: DockerEngine, box: str) -> None:
    session = await engine.exec(box, shell_request("sleep 1000"))
    reading = asyncio.create_task(read_all(session))
    pid = await wait_for_pid(session)
    await session.close()
    await session.close()
    assert await reading == (b"", b"")
    await session.write(b"discarded")
    assert await session.status() == ExecStatus(running=True, exit_code=None, pid=pid)
    assert HostProcessControl().signal(pid, box, signal.SIGKILL)


async def test_a_stop_and_a_removal_of_the_container_end_the_stream(engine: DockerEngine, box: str) -> None:
    async with (
        open_session(engine, box, shell_request("echo a; sleep 1000")) as first,
        open_session(engine, box, shell_request("echo b; sleep 1000", stdin=True)) as second,
    ):
        reader = second.read()
        assert await anext(reader) == (OUT, b"b\n")
        await engine.stop(box, 0)
        assert await read_all(first) == (b"a\n", b"")
        assert (await first.status()).exit_code == 137
        assert [chunk async for chunk in reader] == []
        await engine.remove(box)
        assert await second.status() == ExecStatus(running=False, exit_code=None, pid=0)


@pytest.mark.deep
async def test_the_status_of_an_unavailable_engine_is_not_an_exit(box: str, engine_proxy: EngineProxy) -> None:
    async with connect_engine(engine_proxy.url, timeout=limit(3)) as engine:
        for fault in (engine_proxy.faults.drop, engine_proxy.faults.hang):
            async with open_session(engine, box, shell_request("true")) as session:
                await read_all(session)
                fault("GET", "/exec/.*", times=None)
                with pytest.raises(EngineUnavailable):
                    await session.status()
                engine_proxy.faults.clear()
                assert (await session.status()).exit_code == 0


@pytest.mark.deep
@pytest.mark.parametrize("path", ["/containers/.*/exec", "/exec/.*/start"])
async def test_a_start_that_fails_hangs_or_is_dropped_raises_an_error(
    box: str, engine_proxy: EngineProxy, path: str
) -> None:
    async with connect_engine(engine_proxy.url, timeout=limit(2)) as engine:
        engine_proxy.faults.drop("POST", path)
        with pytest.raises(EngineUnavailable):
            await engine.exec(box, shell_request("true"))
        engine_proxy.faults.fail("POST", path, status=500, message="broken")
        with pytest.raises(EngineRejected, match="broken"):
            await engine.exec(box, shell_request("true"))
        engine_proxy.faults.hang("POST", path)
        with pytest.raises(EngineUnavailable, match="timed out"):
            await engine.exec(box, shell_request("true"))
        hanging = engine_proxy.faults.hang("POST", path)
        starting = asyncio.create_task(engine.exec(box, shell_request("true")))
        await hanging.hit.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    await asyncio.wait_for(engine_proxy.idle(), limit(5))
