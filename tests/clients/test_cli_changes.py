"""Changes of a spec with the command: requests, plans, and questions at a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
from collections.abc import AsyncIterator
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf.duration_pb2 import Duration
from gpudock import Container, ContainerSpec, Mount
from gpudock.cli import main
from gpudock.cli._operation_views import plan_details as plan_view
from gpudock.cli._views import container_details as container_view
from gpudock.cli._views import node_details as node_view
from gpudock.v1 import container_pb2, gpu_pb2, node_pb2, node_service_pb2, operation_pb2
from gpudock.v1 import container_service_pb2 as pb

from tests.clients import messages
from tests.clients.command import DEADLINE, read_until, run, spawn
from tests.clients.scripted_server import Context, ScriptedServer, reply_with
from tests.rig.patience import limit

CHANGES = (
    operation_pb2.SpecChange(path="env.C", new_value="3"),
    operation_pb2.SpecChange(path="env.A", old_value="a\x1b[2Jb"),
    operation_pb2.SpecChange(path="memory_bytes", old_value="1073741824", new_value="1073741825"),
)


@pytest.fixture
def change_server(server: ScriptedServer) -> ScriptedServer:
    """A server with a container with etag `e1`, whose changes restart the process."""

    def change_reply(response: Any) -> Any:
        async def answer(request: Any, _: Context) -> AsyncIterator[Any]:
            if request.validate_only:
                plan = operation_pb2.OperationPlan(stages=["stop"], restarts_process=True, spec_changes=CHANGES)
                yield response(operation=operation_pb2.Operation(plan=plan))
            else:
                yield response(result=messages.container())

        return answer

    container = messages.container()
    container.etag = "e1"
    container.spec.gpus.CopyFrom(container_pb2.GpuRequest(count=1, model="a100", min_memory_bytes=7))
    server.on("GetContainer", reply_with(pb.GetContainerResponse(container=container)))
    for name in ("Update", "Scale", "Rollback", "Start"):
        server.on(f"{name}Container", change_reply(getattr(pb, f"{name}ContainerResponse")))
    return server


async def test_update_adds_and_removes_single_entries(change_server: ScriptedServer) -> None:
    """Options change the entries that they name, and keep all others."""
    options = (
        *("-e", "C=3", "--env-rm", "A", "-v", "second:/s", "--tmpfs", "/t", "--volume-rm", "/data"),
        *("-p", "9999", "--port-rm", "8888", "--port-rm", "53/udp", "--label", "a=b", "--label-rm", "team"),
    )
    ended = await run(change_server.address, "update", "train", *options)
    assert ended.code == 0, ended
    [request] = change_server.requests["UpdateContainer"]
    assert (list(request.update_mask.paths), request.spec) == ([], ContainerSpec())
    assert request.edits == pb.ContainerSpecEdits(
        set_env={"C": "3"},
        remove_env=["A"],
        add_mounts=[Mount(volume="second", target="/s"), Mount(tmpfs=container_pb2.TmpfsMount(), target="/t")],
        remove_mounts=["/data"],
        add_ports=[container_pb2.PortRequest(container_port=9999, protocol=1)],  # type: ignore[arg-type]  # a value of the enum
        remove_ports=[
            pb.ContainerPort(container_port=8888, protocol=1),  # type: ignore[arg-type]  # a value of the enum
            pb.ContainerPort(container_port=53, protocol=2),  # type: ignore[arg-type]  # a value of the enum
        ],
        set_labels={"a": "b"},
        remove_labels=["team"],
    )


async def test_replace_options_replace_all_entries(change_server: ScriptedServer) -> None:
    options = ("-e", "C=3", "--replace-env", "-p", "80", "--replace-ports", "--label-rm", "x", "--clear", "mounts")
    assert (await run(change_server.address, "update", "train", *options)).code == 0
    [request] = change_server.requests["UpdateContainer"]
    assert sorted(request.update_mask.paths) == ["env", "mounts", "ports"]
    assert dict(request.spec.env) == {"C": "3"}
    assert request.edits == pb.ContainerSpecEdits(remove_labels=["x"])


async def test_an_option_of_a_part_keeps_the_other_parts(change_server: ScriptedServer) -> None:
    options = ("--keep-for", "2h", "--keep-files", "cheap", "--health-cmd", "true")
    assert (await run(change_server.address, "update", "train", *options)).code == 0
    [request] = change_server.requests["UpdateContainer"]
    assert sorted(request.update_mask.paths) == [
        "health_check.command",
        "revision_policy.keep_for",
        "revision_policy.snapshots",
    ]


@pytest.mark.parametrize("command", ["update", "scale", "start"])
async def test_a_number_of_gpus_keeps_their_model_and_memory(change_server: ScriptedServer, command: str) -> None:
    assert (await run(change_server.address, command, "train", "--gpus", "2")).code == 0
    assert (
        await run(change_server.address, command, "train", "--gpus", "2", "--gpu-model", "", "--gpu-memory", "8")
    ).code == 0
    first, second = change_server.requests[f"{command.title()}Container"]
    sent = [request.spec.gpus if command == "update" else request.gpus for request in (first, second)]
    assert sent[0] == container_pb2.GpuRequest(count=2, model="a100", min_memory_bytes=7)
    assert sent[1] == container_pb2.GpuRequest(count=2, min_memory_bytes=8)
    assert first.etag == "e1", "what the kind was read from"


async def test_all_gpus_are_the_free_ones_and_those_of_the_container(change_server: ScriptedServer) -> None:
    def gpu(number: int, **fields: Any) -> gpu_pb2.Gpu:
        return gpu_pb2.Gpu(
            **{"uuid": f"GPU-{number}", "name": "NVIDIA A100", "memory_total_bytes": 80, "schedulable": True, **fields}
        )

    gpus = [
        gpu(0),
        gpu(1, container="train"),
        gpu(2, container="other"),
        gpu(3, schedulable=False),
        gpu(4, name="T4"),
        gpu(5, memory_total_bytes=6),
    ]
    change_server.on("ListGpus", reply_with(node_service_pb2.ListGpusResponse(gpus=gpus)))
    ended = await run(change_server.address, "scale", "train", "--gpus", "all")
    assert (ended.code, ended.err) == (0, "--gpus all: 2\n"), ended
    assert change_server.requests["ScaleContainer"][0].gpus.count == 2
    change_server.on("ListGpus", reply_with(node_service_pb2.ListGpusResponse(gpus=gpus[2:])))
    refused = await run(
        change_server.address, "create", "train", "busybox", "--gpus", "all", "--gpu-model", "a100", "--gpu-memory", "9"
    )
    assert (refused.code, refused.out) == (4, "")
    assert "no matching GPU is free" in refused.err
    assert not change_server.requests["CreateContainer"]


DIFFERENCE = [
    "+ env.C: 3",
    r"- env.A: a\x1b[2Jb",
    "- memory_bytes: 1073741824 (1.0 GiB)",
    "+ memory_bytes: 1073741825 (1.0 GiB)",
]


async def test_a_plan_shows_the_changes_of_the_spec(change_server: ScriptedServer) -> None:
    ended = await run(change_server.address, "update", "train", "-e", "C=3", "--validate-only")
    assert [line.removeprefix("spec:").strip() for line in ended.out.splitlines()[-4:]] == DIFFERENCE
    [request] = change_server.requests["UpdateContainer"]
    assert request.validate_only


@pytest.mark.parametrize(
    ("words", "rpc"),
    [
        ("update train -e C=3", "UpdateContainer"),
        ("scale train --memory 1g", "ScaleContainer"),
        ("rollback train 1", "RollbackContainer"),
    ],
)
@pytest.mark.parametrize("answer", ["y", "n"])
async def test_a_restart_is_confirmed_at_a_terminal(
    change_server: ScriptedServer, words: str, rpc: str, answer: str
) -> None:
    terminal, command_end = pty.openpty()
    process = await spawn(
        change_server.address, *words.split(), stdin=command_end, stdout=command_end, stderr=command_end
    )
    try:
        shown = (await read_until(terminal, b"[y/N]: ")).decode().replace("\r\n", "\n")
        assert shown.startswith("\n".join(DIFFERENCE) + "\nThis stops and restarts the process of train. Continue?")
        os.write(terminal, f"{answer}\n".encode())
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == (0 if answer == "y" else 1)
    finally:
        os.close(terminal)
        os.close(command_end)
    planned, *changes = change_server.requests[rpc]
    assert (planned.validate_only, planned.etag) == (True, "e1")
    assert [(request.validate_only, request.etag) for request in changes] == ([(False, "e1")] if answer == "y" else [])


async def test_yes_skips_the_question(change_server: ScriptedServer) -> None:
    terminal, command_end = pty.openpty()
    words = ("update", "train", "-e", "C=3", "-y")
    process = await spawn(change_server.address, *words, stdin=command_end, stdout=command_end, stderr=command_end)
    try:
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 0
    finally:
        os.close(terminal)
        os.close(command_end)
    [request] = change_server.requests["UpdateContainer"]
    assert not request.validate_only


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "update c -e A=1 --clear env",
            "--clear env cannot be combined with a new value; to replace all entries use --replace-env",
        ),
        ("update c --user a --clear user", "--clear user cannot be combined with a new value"),
        ("update c --env-rm A --clear env", "--clear env removes all entries; it cannot be combined with --env-rm"),
        ("update c --replace-env", "--replace-env needs -e; to remove all use --clear env"),
        ("update c --replace-ports -p 80 --port-rm 81", "--replace-ports cannot be combined with --port-rm"),
        ("update c --port-rm 8080:80", "give the container port alone, such as 80"),
        ("clone c d --replace-volumes", "--replace-volumes needs -v or --tmpfs"),
    ],
)
def test_contradicting_options_are_refused(arguments: str, message: str) -> None:
    result = CliRunner().invoke(main, ["--address", "/nowhere", *arguments.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run busybox true", "use -d to run it in the background, and then `gpudock exec -it NAME -- sh`"),
        ("run -it --name c busybox", "use -d to run it in the background"),
        ("run -d busybox true", "--name is required"),
        ("run -d --rm --name c busybox", "--rm is not supported"),
        (
            "kill c -s HUP",
            "kill sends SIGKILL only, not HUP; for the main process use: gpudock exec c -- kill -s HUP 1",
        ),
    ],
)
def test_options_of_docker_that_gpudock_lacks_are_refused_with_a_remedy(arguments: str, message: str) -> None:
    result = CliRunner().invoke(main, ["--address", "/nowhere", *arguments.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


WHOLE = ContainerSpec(
    image="busybox",
    entrypoint=["/bin/sh", "-c"],
    command=["sleep 9"],
    env={"LR": "0.1", "TWO": "a\nb"},
    working_dir="/work",
    user="1000:1000",
    hostname="box",
    tty=True,
    stdin=True,
    labels={"team": "ml"},
    gpus=container_pb2.GpuRequest(count=2, model="a100", min_memory_bytes=1 << 30),
    cpus=1.5,
    memory_bytes=3 << 30,
    shm_size_bytes=5 << 20,
    pids_limit=77,
    mounts=[Mount(volume="data", target="/data", read_only=True)],
    ports=[container_pb2.PortRequest(container_port=80, host_port=8080)],
    restart_policy=container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ON_FAILURE, max_retry_count=3),
    stop_signal="SIGINT",
    stop_timeout=Duration(seconds=7),
    health_check=container_pb2.HealthCheck(command=["true"], interval=Duration(seconds=9), retries=4),
    revision_policy=container_pb2.RevisionPolicy(
        snapshots=container_pb2.SNAPSHOT_POLICY_CHEAP, keep_revisions=6, keep_for=Duration(seconds=90)
    ),
)


def test_get_shows_every_field_that_is_set() -> None:
    """Every field of the spec has a line, also the environment, the user and the health check."""
    shown = container_view(Container(spec=WHOLE))
    for field in ContainerSpec.DESCRIPTOR.fields:
        assert getattr(WHOLE, field.name), f"{field.name} is not set here"
        rest = ContainerSpec()
        rest.CopyFrom(WHOLE)
        rest.ClearField(field.name)  # type: ignore[arg-type] # by name
        assert container_view(Container(spec=rest)) != shown, f"{field.name} is not shown"
    for text in ("LR=0.1\n", r"TWO=a\nb", "data:/data:ro", '2 of model "a100" with 1.0 GiB or more', "8080:80/tcp"):
        assert text in shown
    for text in (
        "on-failure:3",
        "SIGINT",
        "7s",
        "true; every 9s; 4 failures",
        "files kept: cheap, 6 revisions, for 90s",
    ):
        assert text in shown


def test_get_shows_that_a_process_was_killed_for_lack_of_memory() -> None:
    for killed in (True, False):
        shown = container_view(Container(status=container_pb2.ContainerStatus(oom_killed=killed)))
        assert ("killed for memory" in shown) == killed


def test_a_node_without_a_driver_shows_that_none_answers() -> None:
    """Such a node is healthy."""
    driver = node_pb2.NODE_COMPONENT_GPU_DRIVER
    component = node_pb2.ComponentHealth(component=driver, healthy=True, message="NVML cannot be used")
    shown = node_view(node_pb2.Node(components=[component]))
    assert "does not answer: NVML cannot be used" in shown
    loaded = node_view(node_pb2.Node(driver_version="570.1", components=[component]))
    assert "answers: NVML cannot be used" in loaded


def test_a_plan_omits_unknown_available_bytes() -> None:
    assert "available: 4.0 KiB" in plan_view(operation_pb2.OperationPlan(bytes_to_move=1, bytes_available=4096))
    assert "available" not in plan_view(operation_pb2.OperationPlan(bytes_to_move=1))


async def test_inspect_prints_json_and_output_can_follow_the_command(change_server: ScriptedServer) -> None:
    inspected = json.loads((await run(change_server.address, "inspect", "train")).out)
    assert inspected["name"] == "train"
    assert json.loads((await run(change_server.address, "get", "train", "-o", "json")).out) == inspected
    assert json.loads((await run(change_server.address, "get", "-o", "json", "train")).out) == inspected
    assert (await run(change_server.address, "-o", "json", "get", "train", "-o", "table")).out.startswith("name:")
