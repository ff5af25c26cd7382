"""Shell completion: against the daemon, and when there is none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from click.testing import CliRunner
from gpudock import ContainerRevision
from gpudock.cli import main
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1 import volume_service_pb2

from tests.calls import IDLE, IMAGE, Caller
from tests.clients import messages
from tests.clients.command import run
from tests.clients.completing import SHELLS, answered, bash, proposals
from tests.clients.scripted import Context, ScriptedServer, saying
from tests.rig import Daemon
from tests.rig.patience import limit


@pytest.fixture
async def populated(shared_daemon: Daemon, caller: Caller) -> str:  # noqa: ARG001 - deletes what the test creates
    """The address of a daemon with two containers, of which one has two revisions, and a volume."""
    for words in (
        ("volume", "create", "data"),
        ("create", "train", IMAGE, "--gpus", "1", "--", *IDLE),
        ("create", "serve", IMAGE, "--", *IDLE),
        ("scale", "train", "--cpus", "1"),
    ):
        result = await run(shared_daemon.target, *words)
        assert result.code == 0, result
    return shared_daemon.target


@pytest.mark.parametrize("shell", SHELLS)
async def test_names_are_completed_from_the_daemon(populated: str, shell: str) -> None:
    async def complete(line: str) -> list[str]:
        return await proposals(shell, populated, line)

    assert sorted(await complete("gpudock get ")) == ["serve", "train"]
    assert await complete("gpudock stop tr") == ["train"]
    assert await complete("gpudock exec -it s") == ["serve"]
    assert await complete("gpudock ports --container tr") == ["train"]
    assert await complete("gpudock clone se") == ["serve"]
    assert await complete("gpudock volume resize ") == ["data"]
    assert await complete("gpudock create c busybox -v da") == ["data:"]
    assert await complete("gpudock rollback train ") == ["1", "2"]
    assert await complete("gpudock revision get train 2") == ["2"]
    assert await complete("gpudock clone train second --revision ") == ["1", "2"]
    assert await complete("gpudock get nothing-like-it") == []
    [held] = [gpu for gpu in await complete("gpudock create c busybox --gpu ") if gpu][:1]
    assert held.startswith("GPU-")
    # The daemon is not needed for these.
    assert "volume" in await complete("gpudock vol")
    assert await complete("gpudock ps -o y") == ["yaml"]
    assert await complete("gpudock --add") == ["--address"]


async def test_bash_itself_completes(populated: str) -> None:
    """The script is sourced by the real bash, and its function is called as bash does when Tab is pressed."""
    script = """
    eval "$(gpudock completion bash)"
    complete -p gpudock
    COMP_WORDS=(gpudock stop tr) COMP_CWORD=2
    _gpudock_completion gpudock
    echo "${COMPREPLY[@]}"
    """
    registered, completed = (await bash(script, populated)).splitlines()
    assert registered == "complete -o nosort -F _gpudock_completion gpudock"
    assert completed == "train"


@pytest.mark.parametrize("shell", SHELLS)
async def test_the_address_of_the_line_is_used(server: ScriptedServer, shell: str) -> None:
    server.on("ListContainers", saying(pb.ListContainersResponse(containers=[messages.container()])))
    line = f"gpudock --address {server.address} get "
    assert await proposals(shell, "unix:/nowhere", line) == ["train"]
    assert await proposals(shell, server.address, "gpudock --token-file /nowhere get ") == ["train"]


async def test_descriptions_are_for_the_shells_that_show_them(server: ScriptedServer) -> None:
    server.on("ListContainers", saying(pb.ListContainersResponse(containers=[messages.container()])))
    server.on("ListVolumes", saying(volume_service_pb2.ListVolumesResponse(volumes=[messages.volume()])))
    assert (await answered("zsh", server.address, "gpudock get ")).out == "plain\ntrain\nRUNNING\n"
    assert (await answered("fish", server.address, "gpudock get ")).out == "plain,train\tRUNNING\n"
    assert (await answered("bash", server.address, "gpudock get ")).out == "plain,train\n"
    assert (await answered("zsh", server.address, "gpudock create c i -v ")).out == "plain\ndata\\:\nREADY\n"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("address", ["unix:/nowhere/at/all", "127.0.0.1:1"])
async def test_without_a_daemon_there_is_silence(shell: str, address: str) -> None:
    for line in ("gpudock get ", "gpudock volume delete ", "gpudock rollback train ", "gpudock run -v "):
        assert await proposals(shell, address, line) == [], line


async def test_a_daemon_that_hangs_is_not_waited_for(server: ScriptedServer) -> None:
    """The call is given up, which the server sees; the shell gets no proposals and no message."""
    given_up = asyncio.Event()

    async def hangs(_: Any, __: Context) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    server.on("ListContainers", hangs)
    assert await proposals("bash", server.address, "gpudock get ", timeout=5) == []
    await asyncio.wait_for(given_up.wait(), limit(30))


async def test_revisions_are_those_of_the_container_on_the_line(server: ScriptedServer) -> None:
    async def revisions(request: pb.ListContainerRevisionsRequest, _: Context) -> pb.ListContainerRevisionsResponse:
        number = {"train": 7, "serve": 9}[request.name]
        return pb.ListContainerRevisionsResponse(revisions=[ContainerRevision(revision=number)])

    server.on("ListContainerRevisions", revisions)
    assert await proposals("fish", server.address, "gpudock rollback train ") == ["7"]
    assert await proposals("fish", server.address, "gpudock revision delete serve ") == ["9"]
    assert await proposals("bash", server.address, "gpudock clone train second --revision ") == ["7"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_calls_back_in_its_protocol(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_GPUDOCK_COMPLETE={shell}_complete" in result.output
    assert "did you mean" not in result.output.lower()


def test_a_shell_that_is_not_known_is_named_with_those_that_are() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.output
