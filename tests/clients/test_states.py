"""The states of containers in the output of the command."""

from __future__ import annotations

from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1.container_pb2 import CONTAINER_STATE_RESTARTING

from tests.clients import messages
from tests.clients.command import run
from tests.clients.scripted_server import ScriptedServer, reply_with


async def test_a_crash_loop_is_shown_with_its_exit_code(server: ScriptedServer) -> None:
    looping = messages.container()
    looping.status.state = CONTAINER_STATE_RESTARTING
    looping.status.exit_code = 3
    server.on("ListContainers", reply_with(pb.ListContainersResponse(containers=[looping])))
    ended = await run(server.address, "ps", "--state", "restarting")
    assert "RESTARTING (3)" in ended.out
    assert list(server.requests["ListContainers"][0].filter.states) == [CONTAINER_STATE_RESTARTING]
