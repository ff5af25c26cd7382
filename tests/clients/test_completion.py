"""Shell completion, with and without a daemon."""

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
from tests.clients.scripted_server import Context, ScriptedServer, reply_with
from tests.clients.shell_completion import SHELLS, bash, proposals, run_completion
from tests.rig import Daemon
from tests.rig.patience import limit


@pytest.fixture
async def populated(shared_daemon: Daemon, caller: Caller) -> str:  # noqa: ARG001 - deletes what the test creates
    """The address of a daemon with a volume and two containers, one of which has two revisions."""
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
    assert await complete("gpudock get no-such-prefix") == []
    [first] = [gpu for gpu in await complete("gpudock create c busybox --gpu ") if gpu][:1]
    assert first.startswith("GPU-")
    # These completions need no daemon.
    assert "volume" in await complete("gpudock vol")
    assert await complete("gpudock ps -o y") == ["yaml"]
    assert await complete("gpudock --add") == ["--address"]


async def test_bash_completes_names(populated: str) -> None:
    """Bash sources the script and calls its function as for the Tab key."""
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
async def test_the_address_on_the_command_line_is_used(server: ScriptedServer, shell: str) -> None:
    server.on("ListContainers", reply_with(pb.ListContainersResponse(containers=[messages.container()])))
    line = f"gpudock --address {server.address} get "
    assert await proposals(shell, "unix:/nowhere", line) == ["train"]
    assert await proposals(shell, server.address, "gpudock --token-file /nowhere get ") == ["train"]


async def test_descriptions_are_sent_only_to_shells_that_show_them(server: ScriptedServer) -> None:
    server.on("ListContainers", reply_with(pb.ListContainersResponse(containers=[messages.container()])))
    server.on("ListVolumes", reply_with(volume_service_pb2.ListVolumesResponse(volumes=[messages.volume()])))
    assert (await run_completion("zsh", server.address, "gpudock get ")).out == "plain\ntrain\nRUNNING\n"
    assert (await run_completion("fish", server.address, "gpudock get ")).out == "plain,train\tRUNNING\n"
    assert (await run_completion("bash", server.address, "gpudock get ")).out == "plain,train\n"
    assert (await run_completion("zsh", server.address, "gpudock create c i -v ")).out == "plain\ndata\\:\nREADY\n"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("address", ["unix:/nowhere/at/all", "127.0.0.1:1"])
async def test_without_a_daemon_there_are_no_proposals_and_no_messages(shell: str, address: str) -> None:
    for line in ("gpudock get ", "gpudock volume delete ", "gpudock rollback train ", "gpudock run -v "):
        assert await proposals(shell, address, line) == [], line


async def test_a_completion_cancels_its_call_to_a_daemon_that_hangs(server: ScriptedServer) -> None:
    """The shell gets no proposals and no message."""
    cancelled = asyncio.Event()

    async def hangs(_: Any, __: Context) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    server.on("ListContainers", hangs)
    assert await proposals("bash", server.address, "gpudock get ", timeout=5) == []
    await asyncio.wait_for(cancelled.wait(), limit(30))


async def test_revisions_are_those_of_the_container_on_the_command_line(server: ScriptedServer) -> None:
    async def revisions(request: pb.ListContainerRevisionsRequest, _: Context) -> pb.ListContainerRevisionsResponse:
        number = {"train": 7, "serve": 9}[request.name]
        return pb.ListContainerRevisionsResponse(revisions=[ContainerRevision(revision=number)])

    server.on("ListContainerRevisions", revisions)
    assert await proposals("fish", server.address, "gpudock rollback train ") == ["7"]
    assert await proposals("fish", server.address, "gpudock revision delete serve ") == ["9"]
    assert await proposals("bash", server.address, "gpudock clone train second --revision ") == ["7"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_requests_completions_for_it(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_GPUDOCK_COMPLETE={shell}_complete" in result.output
    assert "did you mean" not in result.output.lower()


def test_an_unknown_shell_is_refused_with_the_known_ones() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.output
