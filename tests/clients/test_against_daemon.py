"""The command and the Python client with a daemon on the rig's engine."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncIterator
from typing import Any

import click
import gpudock
import pytest
import yaml
from gpudock import Client, OperationStageState, OperationState
from gpudock.cli import main

from tests.calls import IDLE, IMAGE, Caller
from tests.clients.command import DEADLINE, CommandResult, read_until, run, set_size, spawn, wait_for_result
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.rig import Daemon, Rig
from tests.rig.patience import limit

# As PID 1 it ignores SIGTERM: a stop takes its whole grace period, in which a test can act.
STUBBORN = ("sleep", "infinity")
GRACE = 3
_COMMITTED = "gpudock/tour"
_GROUPS = {name: group for name, group in main.commands.items() if isinstance(group, click.Group)}


class Commands:
    """Runs the command with one daemon, and records which subcommands were run."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.used: set[str] = set()

    async def run(self, *words: str, stdin: bytes = b"") -> CommandResult:
        """Run the command; return its result."""
        self._record(words)
        return await run(self.address, *words, stdin=stdin)

    async def output(self, *words: str) -> str:
        """Run the command, which must succeed; return its stdout."""
        result = await self.run(*words)
        assert result.code == 0, (words, result)
        return result.out

    async def read_json(self, *words: str) -> Any:
        """Run the command with JSON output, which must succeed; return the output."""
        self._record(words)
        result = await run(self.address, "--output", "json", *words)
        assert result.code == 0, (words, result)
        return json.loads(result.out)

    def _record(self, words: tuple[str, ...]) -> None:
        self.used.add(" ".join(words[: 2 if words[0] in _GROUPS else 1]))


@pytest.fixture
def commands(shared_daemon: Daemon, caller: Caller) -> Commands:  # noqa: ARG001 - deletes what the test creates
    """Commands with the shared daemon; containers and volumes are deleted after the test."""
    return Commands(shared_daemon.target)


@pytest.fixture
async def real(shared_daemon: Daemon, caller: Caller) -> AsyncIterator[Client]:  # noqa: ARG001 - as above
    """A client of the shared daemon; containers and volumes are deleted after the test."""
    async with Client(shared_daemon.target) as client:
        yield client


@pytest.mark.timeout(600)
async def test_every_command_works_with_a_daemon(commands: Commands, rig: Rig) -> None:
    options = ("--gpus", "2", "-p", "8888", "-e", "A=b", "--label", "team=ml", "--memory", "64MiB", "--owner", "me")
    created = await commands.run("create", "tour", IMAGE, *options, "--", *IDLE)
    assert created.code == 0, created
    stages = ("create", "start", "commit")
    assert [line.split()[:2] for line in created.err.splitlines()] == [[name, "done"] for name in stages]
    assert created.out.splitlines()[1].split()[:3] == ["tour", "RUNNING", "2"]
    container = await commands.read_json("get", "tour")
    [port] = container["status"]["ports"]
    assert (container["spec"]["memory_bytes"], container["owner"]) == (str(64 * 2**20), "me")
    assert [each["name"] for each in await commands.read_json("list", "--state", "running", "--label", "team=ml")] == [
        "tour"
    ]
    assert (await commands.output("ps")).splitlines()[1].startswith("tour  RUNNING  2")
    assert await commands.output("ps", "-q") == "tour\n"
    assert yaml.safe_load(await commands.output("get", "tour", "-o", "yaml"))["uid"] == container["uid"]

    assert (
        await commands.output("exec", "tour", "--", "sh", "-c", "echo $A; ls /dev | grep -c 'nvidia[0-9]'") == "b\n2\n"
    )
    held = {gpu["uuid"] for gpu in await commands.read_json("gpus", "--held")}
    assert held == set(container["status"]["gpu_uuids"])
    assert len((await commands.output("gpus", "--free")).splitlines()) == 1 + 6
    [claim] = await commands.read_json("ports", "--container", "tour")
    assert (claim["host_port"], claim["container_port"]) == (port["host_port"], 8888)
    assert "8: 6 free, 2 held" in await commands.output("node")

    plan = await commands.read_json("scale", "tour", "--gpus", "4", "--validate-only")
    assert (plan["gpus_to_claim"], set(plan["kept_gpu_uuids"]), plan["restarts_process"]) == (2, held, True)
    scaled = await commands.read_json("scale", "tour", "--gpus", "4", "--memory", "128MiB")
    assert held < set(scaled["status"]["gpu_uuids"])
    assert scaled["status"]["ports"] == [port]
    assert scaled["spec"]["memory_bytes"] == str(128 * 2**20)
    done = await commands.read_json("operations", "list", "--container", "tour", "--kind", "scale-container")
    assert [each["state"] for each in done] == ["OPERATION_STATE_SUCCEEDED"]
    assert "carry" in await commands.output("operations", "get", done[0]["id"])
    watched = await commands.run("operations", "watch", done[0]["id"])
    assert (watched.code, watched.out.split()[8:11]) == (0, ["tour", "RUNNING", "4"]), watched
    assert (await commands.run("operations", "cancel", done[0]["id"])).code == 7

    await _tour_of_history(commands, container)
    await _tour_of_watch(commands, "watch")
    await _tour_of_volumes(commands, rig)
    assert await commands.read_json("drift", "--container", "tour") == []
    committed = await commands.read_json("commit", "tour", f"{_COMMITTED}:v1", "-m", "a tour")
    assert rig.engine.call("GET", f"/images/{_COMMITTED}:v1/json")["Id"] == committed["id"]
    rig.engine.call("DELETE", f"/images/{_COMMITTED}:v1")

    for command, state in (
        *(("pause", "PAUSED"), ("unpause", "RUNNING"), ("restart", "RUNNING"), ("stop", "STOPPED")),
        *(("start", "RUNNING"), ("kill", "STOPPED")),
    ):
        assert (await commands.read_json(command, "tour"))["status"]["state"] == f"CONTAINER_STATE_{state}"
    assert json.loads(await commands.output("inspect", "tour"))["status"]["exit_code"] == 128 + signal.SIGKILL
    assert await commands.read_json("gpus", "--held") == []
    assert len((await commands.read_json("start", "tour", "--gpus", "1"))["status"]["gpu_uuids"]) == 1
    assert await commands.output("delete", "tour", "--force") == ""
    assert await commands.read_json("ps") == []
    await _tour_of_docker_habits(commands)
    assert "_GPUDOCK_COMPLETE=bash_complete" in await commands.output("completion", "bash")
    within = {f"{name} {each}" for name, group in _GROUPS.items() for each in group.commands}
    assert commands.used == {name for name in main.commands if name not in _GROUPS} | within


async def _tour_of_docker_habits(commands: Commands) -> None:
    words = ("run", "-d", "--name", "tour", "--gpus", "all", "-m", "64m", "--stop-signal", "KILL", "-e", "PATH", "-t")
    assert (await commands.output(*words, IMAGE, *IDLE)).splitlines()[1].split()[:3] == ["tour", "RUNNING", "8"]
    created = await commands.read_json("get", "tour")
    assert (created["spec"]["command"], created["spec"]["stop_signal"], created["spec"]["tty"]) == (
        [*IDLE],
        "KILL",
        True,
    )
    assert created["spec"]["env"] == {"PATH": os.environ["PATH"]}
    assert await commands.output("rm", "-f", "tour") == ""


async def _tour_of_volumes(commands: Commands, rig: Rig) -> None:
    assert (await commands.read_json("volume", "create", "tour", "320M"))["size_bytes"] == str(320 << 20)
    assert (await commands.read_json("volume", "resize", "tour", "330M"))["size_bytes"] == str(330 << 20)
    rig.engine.call("POST", "/volumes/create", send={"Name": "theirs", "Labels": {"gpudock.adopt": "true"}})
    assert (await commands.read_json("volume", "adopt", "mine", "theirs"))["backend"] == "VOLUME_BACKEND_PLAIN"
    assert [each["name"] for each in await commands.read_json("volume", "list")] == ["mine", "tour"]
    assert "330.0 MiB" in await commands.output("volume", "get", "tour")
    assert [each["revision"] for each in await commands.read_json("volume", "revisions", "tour")] == ["1", "2"]
    assert await commands.output("volume", "delete", "mine") == ""
    await _tour_of_watch(commands, "volume", "watch")
    assert "engine-volume" in await commands.output("volume", "delete", "tour", "--force", "--validate-only")
    assert await commands.output("volume", "delete", "tour", "--force") == ""


async def _tour_of_history(commands: Commands, container: Any) -> None:
    """`container` is the first revision of container `tour`, which has revision 2."""
    updated = await commands.read_json("update", "tour", "-e", "A=c", "--clear", "ports", "--", *IDLE)
    assert (updated["spec"]["env"], updated["spec"]["ports"], updated["status"]["ports"]) == ({"A": "c"}, [], [])
    assert len(updated["status"]["gpu_uuids"]) == 4
    assert await commands.output("exec", "tour", "--", "sh", "-c", "echo $A; echo kept > /note") == "c\n"
    history = (await commands.output("revisions", "tour")).splitlines()
    assert [line.split()[:2] for line in history[1:]] == [["1", "CREATED"], ["2", "SCALED"], ["3", "*"]]
    plan = await commands.read_json("rollback", "tour", "1", "--validate-only")
    assert (plan["snapshot"], plan["restarts_process"]) == ("SNAPSHOT_KIND_TREE", True)
    returned = await commands.read_json("rollback", "tour", "1")
    assert (returned["revision"], returned["spec"]) == ("4", container["spec"])
    assert await commands.output("exec", "tour", "--", "sh", "-c", "ls /note || echo $A") == "b\n"
    assert (await commands.read_json("revision", "get", "tour", "3"))["snapshot"]["kind"] == "SNAPSHOT_KIND_TREE"
    assert (await commands.read_json("revision", "get", "tour"))["cause"] == "REVISION_CAUSE_ROLLED_BACK"
    clone = await commands.read_json("clone", "tour", "clone-1", "--revision", "3", "--gpus", "1", "--memory", "32MiB")
    assert (clone["spec"]["env"], len(clone["status"]["gpu_uuids"]), clone["owner"]) == ({"A": "c"}, 1, "me")
    assert await commands.output("exec", "clone-1", "--", "cat", "/note") == "kept\n"
    assert await commands.output("delete", "clone-1", "--force") == ""
    assert await commands.output("revision", "delete", "tour", "2") == ""
    assert [each["revision"] for each in await commands.read_json("revisions", "tour")] == ["1", "3", "4"]


async def _tour_of_watch(commands: Commands, *words: str) -> None:
    """A watch lists what exists, and continues until it is interrupted."""
    commands.used.add(" ".join(words))
    process = await spawn(commands.address, *words)
    assert process.stdout is not None
    assert (await asyncio.wait_for(process.stdout.readline(), limit(DEADLINE))).split()[:3] == [
        b"TIME",
        b"EVENT",
        b"NAME",
    ]
    assert (await asyncio.wait_for(process.stdout.readline(), limit(DEADLINE))).split()[1:3] == [b"added", b"tour"]
    process.send_signal(signal.SIGINT)
    assert (await wait_for_result(process)).code == 130


@pytest.mark.deep
async def test_an_update_changes_only_what_it_names(commands: Commands) -> None:
    """-e keeps the other variables, -v the other mounts and -p the other ports; the plan shows the changes."""
    for volume in ("data", "second"):
        await commands.output("volume", "create", volume)
    options = ("-e", "A=1", "-e", "B=2", "-v", "data:/data", "-p", "8888", "--gpus", "1", "--keep-for", "1h")
    before = (await commands.read_json("create", "train", IMAGE, *options, "--", *IDLE))["spec"]
    more = ("-e", "C=3", "--env-rm", "A", "-v", "second:/s", "-p", "9999", "--keep-revisions", "4")
    plan = await commands.read_json("update", "train", *more, "--validate-only")
    assert {change["path"]: (change.get("old_value"), change.get("new_value")) for change in plan["spec_changes"]} == {
        "env.A": ("1", None),
        "env.C": (None, "3"),
        'mounts["/s"]': (None, '{"volume": "second", "target": "/s"}'),
        'ports["9999/tcp"]': (None, '{"container_port": 9999, "protocol": "PORT_PROTOCOL_TCP"}'),
        "revision_policy.keep_revisions": (None, "4"),
    }
    after = (await commands.read_json("update", "train", *more))["spec"]
    assert after["env"] == {"B": "2", "C": "3"}
    assert [mount["target"] for mount in after["mounts"]] == ["/data", "/s"]
    assert [port["container_port"] for port in after["ports"]] == [8888, 9999]
    assert (after["revision_policy"]["keep_revisions"], after["revision_policy"]["keep_for"]) == (4, "3600s")
    assert (
        await commands.output("exec", "train", "--", "sh", "-c", "echo $A-$B-$C; ls -d /data /s") == "-2-3\n/data\n/s\n"
    )
    assert "spec" not in await commands.output("update", "train", *more, "--validate-only"), (
        "an update to the same spec has changes"
    )
    shown = await commands.output("get", "train")
    assert all(text in shown for text in ("B=2\n", "C=3\n", "second:/s", "9999/tcp", "4 revisions, for 3600s"))
    # Without a number: to the previous revision, which is the first.
    assert (await commands.read_json("rollback", "train"))["spec"] == before
    clone = await commands.read_json(
        "clone", "train", "clone-1", "-e", "C=3", "--port-rm", "8888", "--gpus", "all", "-o", "json"
    )
    assert (clone["spec"]["env"], clone["spec"]["ports"]) == ({"A": "1", "B": "2", "C": "3"}, [])
    assert len(clone["status"]["gpu_uuids"]) == 7
    refused = await commands.run("update", "train", "-p", "1:9", "-p", "1:10", "--volume-rm", "data")
    assert "edits.remove_mounts[0]" in refused.err
    assert "edits.add_ports[1].host_port" in refused.err


async def test_failures_have_their_exit_codes(commands: Commands) -> None:
    await commands.output("create", "train", IMAGE, "--gpus", "7", "--", *IDLE)
    cases = [
        ("get missing", 3, "CONTAINER_NOT_FOUND"),
        ("operations get 17", 3, "OPERATION_NOT_FOUND"),
        (f"create train {IMAGE}", 5, "CONTAINER_EXISTS"),
        (f"create other {IMAGE} --gpus 2", 4, "GPU_EXHAUSTED"),
        ("create other missing/image:1 --pull never", 3, "IMAGE_NOT_FOUND"),
        (f"create Other! {IMAGE}", 2, "name: "),
        ("delete train", 7, "CONTAINER_RUNNING"),
        ("exec train nothing", 127, "nothing"),
        ("exec train /etc", 126, "/etc"),
        ("exec missing true", 125, "CONTAINER_NOT_FOUND"),
    ]
    for words, code, message in cases:
        result = await commands.run(*words.split())
        assert (result.code, result.out) == (code, ""), (words, result)
        assert message in result.err, (words, result)
    assert (await commands.run("exec", "train", "--", "sh", "-c", "exit 42")).code == 42
    assert (await commands.run("exec", "train", "--", "sh", "-c", "kill -KILL $$")).code == 128 + signal.SIGKILL
    late = await commands.run("exec", "--timeout", "200ms", "train", "sleep", "60")
    assert "--timeout expired" in late.err
    assert [each["name"] for each in await commands.read_json("ps")] == ["train"]


async def test_exec_takes_piped_input(commands: Commands) -> None:
    await commands.output("create", "train", IMAGE, "--", *IDLE)
    data = b"0123456789abcde\n" * 2**16
    echoed = await commands.run("exec", "-i", "train", "--", "sh", "-c", "cat; echo end >&2; exit 7", stdin=data)
    assert (echoed.code, echoed.err) == (7, "end\n")
    assert echoed.out == data.decode()
    # The output of a command that does not read all of its input is not lost when writes fail.
    for _ in range(3):
        assert await commands.run("exec", "-i", "train", "head", "-c", "5", stdin=bytes(2**25)) == (0, "\0" * 5, "")


async def test_exec_ends_with_the_signal_that_it_forwards(commands: Commands) -> None:
    await commands.output("create", "train", IMAGE, "--", *IDLE)
    process = await spawn(commands.address, "exec", "train", "--", "sh", "-c", "echo ready; exec sleep 600")
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), limit(DEADLINE)) == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert (await wait_for_result(process)).code == 128 + signal.SIGINT


async def test_exec_at_a_terminal(commands: Commands) -> None:
    await commands.output("create", "train", IMAGE, "--", *IDLE)
    terminal, command_end = pty.openpty()
    set_size(command_end, 97, 31)
    # The engine sets the size after it has started the command, so the script waits for it.
    script = "until stty size | grep '31 97'; do sleep 0.1; done; read word; echo got $word; exec sh"
    words = ("exec", "-it", "train", "--", "sh", "-c", script)
    process = await spawn(commands.address, *words, stdin=command_end, stdout=command_end, stderr=command_end)
    try:
        await read_until(terminal, b"31 97\r\n")
        os.write(terminal, b"hello\r")
        await read_until(terminal, b"got hello\r\n")
        set_size(command_end, 120, 50)
        process.send_signal(signal.SIGWINCH)
        os.write(terminal, b"until stty size | grep '50 120'; do sleep 0.1; done\r")
        await read_until(terminal, b"\n50 120\r\n")
        # The process that is to be interrupted prints this: between two commands the shell ignores Ctrl-C.
        os.write(terminal, b"sh -c 'echo started; exec sleep 600'\r")
        await read_until(terminal, b"\nstarted\r\n")
        os.write(terminal, b"\x03exit 6\r")
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 6
    finally:
        os.close(terminal)
        os.close(command_end)


@pytest.mark.deep
async def test_an_operation_continues_after_ctrl_c_and_can_be_cancelled_or_watched(
    commands: Commands, real: Client
) -> None:
    # Time enough for another command to start before the old process has ended.
    await real.containers.create("train", IMAGE, gpus=1, command=STUBBORN, stop_timeout=limit(5))
    first = await _interrupted_scale(commands, gpus=2)
    cancelled = await commands.run("operations", "cancel", first, "--wait")
    assert cancelled.code == 0, cancelled
    assert "CANCELLED" in cancelled.out
    assert len((await real.containers.get("train")).status.gpu_uuids) == 1
    second = await _interrupted_scale(commands, gpus=3)
    assert second != first
    watched = await commands.run("operations", "watch", second)
    assert watched.code == 0, watched
    assert len((await real.containers.get("train")).status.gpu_uuids) == 3


async def _interrupted_scale(commands: Commands, gpus: int) -> str:
    """Interrupt a scale command; return the id of its operation, which the command prints."""
    process = await spawn(commands.address, "scale", "train", "--gpus", str(gpus))
    assert process.stderr is not None
    assert b"done" in await asyncio.wait_for(process.stderr.readline(), limit(DEADLINE))
    process.send_signal(signal.SIGINT)
    result = await wait_for_result(process)
    assert (result.code, result.out) == (130, "")
    [line] = [line for line in result.err.splitlines() if "continues" in line]
    return line.split()[2]


async def test_the_client_from_create_to_delete(real: Client) -> None:
    call = real.containers.create("trip", IMAGE, gpus=2, ports=[8888], command=IDLE, env={"A": "b"})
    states = [snapshot.state async for snapshot in call]
    assert states[-1] is OperationState.OPERATION_STATE_SUCCEEDED
    created = await call
    assert len(created.status.gpu_uuids) == 2
    done = await real.containers.run("trip", ["sh", "-c", "echo $A; cat >&2; exit 3"], input=b"to stderr")
    assert (done.stdout, done.stderr, done.returncode) == (b"b\n", b"to stderr", 3)
    async with real.containers.exec("trip", ["sh"], stdin=True) as session:
        await session.write(b"echo one > /root/file\ncat /root/file\n")
        assert await anext(session.output()) == ("stdout", b"one\n")
        await session.signal("SIGKILL")
        assert (await session.exit()).signal == "SIGKILL"
    scaled = await real.containers.scale("trip", gpus=4, etag=created.etag)
    assert set(created.status.gpu_uuids) < set(scaled.status.gpu_uuids)
    assert scaled.status.ports == created.status.ports
    assert (await real.containers.run("trip", ["cat", "/root/file"])).stdout == b"one\n"
    with pytest.raises(gpudock.Aborted) as stale:
        await real.containers.scale("trip", gpus=1, etag=created.etag)
    assert stale.value.reason == "STALE_ETAG"
    with pytest.raises(gpudock.Exhausted) as exhausted:
        await real.containers.create("greedy", IMAGE, gpus=5)
    assert exhausted.value.reason == "GPU_EXHAUSTED"
    assert [container.name async for container in real.containers.list(page_size=1)] == ["trip"]
    assert len(await real.node.gpus(claimed=True, page_size=3)) == 4
    assert [each.target.name for each in await real.operations.list(kinds=["scale-container"], container="trip")] == [
        "trip"
    ]
    updated = await real.containers.update("trip", ports=[], labels={"a": "b"}, snapshots="never")
    assert (dict(updated.spec.labels), list(updated.status.ports), len(updated.status.gpu_uuids)) == ({"a": "b"}, [], 4)
    await real.containers.run("trip", ["rm", "/root/file"])
    one, two, three = await real.containers.revisions("trip", page_size=2)
    assert [each.HasField("snapshot") for each in (one, two, three)] == [True, False, False]
    assert await real.containers.revision("trip") == three
    back = await real.containers.rollback("trip", 1)
    assert len(back.status.gpu_uuids) == 2
    assert (await real.containers.run("trip", ["cat", "/root/file"])).stdout == b"one\n"
    await real.containers.delete_revision("trip", 2)
    assert [each.revision async for each in real.containers.revisions("trip")] == [1, 3, 4]
    await real.containers.delete("trip", force=True)
    with pytest.raises(gpudock.NotFound):
        await real.containers.get("trip")
    assert len(await real.node.gpus(claimed=False)) == 8


async def test_a_cancelled_scale_is_undone(real: Client) -> None:
    created = await real.containers.create("train", IMAGE, gpus=2, command=STUBBORN, stop_timeout=GRACE)
    call = real.containers.scale("train", gpus=0)
    await _reach(call, "stop")
    with pytest.raises(gpudock.Busy) as busy:
        await real.containers.scale("train", gpus=1)
    assert busy.value.operation_id == call.operation_id
    await call.cancel()
    with pytest.raises(gpudock.Cancelled):
        await call
    after = await real.containers.get("train")
    assert after.status.state == created.status.state
    assert after.status.gpu_uuids == created.status.gpu_uuids


async def test_a_call_survives_a_restart_of_the_daemon(clean_engine: Rig) -> None:
    """A daemon is killed during a scale. The next one completes it; the call and the watch get the result."""
    rig = clean_engine
    flags = (*FAST_FLAGS, *own_state_flags(), "--node-name", "restarted")
    daemon = await rig.start_daemon(*flags)
    try:
        async with Client(daemon.target) as client:
            created = await client.containers.create("train", IMAGE, gpus=2, command=STUBBORN, stop_timeout=GRACE)
            await client.containers.run("train", ["sh", "-c", "echo kept > /root/file"])
            call = client.containers.scale("train", gpus=4)
            await _reach(call, "stop")
            watching = await spawn(daemon.target, "operations", "watch", call.operation_id)
            assert watching.stderr is not None
            await asyncio.wait_for(watching.stderr.readline(), limit(DEADLINE))
            assert await asyncio.to_thread(daemon.kill9) == -signal.SIGKILL
            daemon = await rig.start_daemon(*flags, socket=daemon.socket, state_dir=daemon.state_dir)
            scaled = await asyncio.wait_for(call.result(), limit(DEADLINE))
            assert len(scaled.status.gpu_uuids) == 4
            assert set(created.status.gpu_uuids) < set(scaled.status.gpu_uuids)
            watched = await wait_for_result(watching)
            assert watched.code == 0, watched
            assert watched.out.splitlines()[1].startswith("train  RUNNING  4")
            assert (await client.containers.run("train", ["cat", "/root/file"])).stdout == b"kept\n"
            assert len(await client.operations.list(kinds=["scale-container"])) == 1
            await client.containers.delete("train", force=True)
    finally:
        await asyncio.to_thread(daemon.stop)


async def _reach(call: gpudock.OperationCall[Any], stage: str) -> None:
    """Wait until a stage of an operation is running."""
    async for snapshot in call:
        running = {
            each.name for each in snapshot.stages if each.state == OperationStageState.OPERATION_STAGE_STATE_RUNNING
        }
        if stage in running:
            return
    raise AssertionError(f"stage {stage} never ran")
