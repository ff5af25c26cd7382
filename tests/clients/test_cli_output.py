"""The output of the command: -o and -q of every command, and tables that fit the terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import click
import grpc
import pytest
import yaml
from click.testing import CliRunner
from google.protobuf import message_factory
from gpudock import CommittedImage, ContainerRevision, Drift, Gpu, Node, Operation, PortClaim, VolumeRevision
from gpudock.cli import main
from gpudock.v1 import container_service_pb2, node_service_pb2, operation_service_pb2, volume_service_pb2
from gpudock.v1.container_pb2 import Container
from gpudock.v1.drift_pb2 import DRIFT_KIND_RESTART_POLICY_CHANGED
from gpudock.v1.operation_pb2 import OperationPlan
from gpudock.v1.port_pb2 import PORT_PROTOCOL_TCP

from tests.clients import messages
from tests.clients.command import DEADLINE, run, set_size, spawn
from tests.clients.many_commands import run_all
from tests.clients.scripted_server import Context, ScriptedServer, abort, reply_with
from tests.rig.patience import limit

# The name of an example of each resource in the output of -q.
_EXAMPLES: dict[str, tuple[Any, str]] = {
    "Container": (messages.container(), "train"),
    "Volume": (messages.volume(), "data"),
    "CommittedImage": (CommittedImage(name="team/model:v1", id="sha256:1"), "team/model:v1"),
    "ContainerRevision": (ContainerRevision(container="train", revision=3, current=True), "3"),
    "VolumeRevision": (VolumeRevision(revision=2), "2"),
    "Operation": (messages.operation(messages.stage("start", messages.SUCCEEDED)), messages.OPERATION_ID),
    "Gpu": (Gpu(uuid="GPU-1"), "GPU-1"),
    "PortClaim": (PortClaim(host_port=40001, protocol=PORT_PROTOCOL_TCP, container="train"), "40001/tcp"),
    "Drift": (Drift(kind=DRIFT_KIND_RESTART_POLICY_CHANGED, container="train", message="changed"), "train"),
    "Node": (Node(name="gpu1"), "gpu1"),
}
# Every command that lists or shows resources: its arguments, and its example.
_SHOWING = {
    "clone": ("train second", "Container"),
    "commit": ("train team/model:v1", "CommittedImage"),
    "create": ("train busybox", "Container"),
    "drift": ("", "Drift"),
    "get": ("train", "Container"),
    "gpus": ("", "Gpu"),
    "inspect": ("train", "Container"),
    "kill": ("train", "Container"),
    "list": ("", "Container"),
    "node": ("", "Node"),
    "operations cancel": ("17", "Operation"),
    "operations get": ("17", "Operation"),
    "operations list": ("", "Operation"),
    "operations watch": ("17", "Container"),
    "pause": ("train", "Container"),
    "ports": ("", "PortClaim"),
    "ps": ("", "Container"),
    "restart": ("train", "Container"),
    "revision get": ("train 3", "ContainerRevision"),
    "revisions": ("train", "ContainerRevision"),
    "rollback": ("train 3", "Container"),
    "run": ("-d --name train busybox", "Container"),
    "scale": ("train --cpus 1", "Container"),
    "start": ("train", "Container"),
    "stop": ("train", "Container"),
    "unpause": ("train", "Container"),
    "update": ("train -e A=1", "Container"),
    "volume adopt": ("data", "Volume"),
    "volume create": ("data", "Volume"),
    "volume get": ("data", "Volume"),
    "volume list": ("", "Volume"),
    "volume resize": ("data 1G", "Volume"),
    "volume revisions": ("data", "VolumeRevision"),
    "volume watch": ("", "Volume"),
    "watch": ("", "Container"),
}
_LISTS = {name for name in _SHOWING if name.split()[-1] in {"list", "ps", "gpus", "ports", "drift", "revisions"}}
_WATCHES = {"watch", "volume watch"}
_PLANS = {
    *("clone", "commit", "create", "rollback", "run", "scale", "start", "update"),
    *("volume adopt", "volume delete", "volume resize"),
}
# Commands that print nothing, or the output of a process.
_SILENT = {"completion", "delete", "exec", "revision delete", "rm"}


def _commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def test_every_command_is_in_the_tables_of_this_file() -> None:
    """A new command is added to the commands with -o and -q, or to those that print nothing."""
    found = dict(_commands(main))
    assert set(found) == set(_SHOWING) | _SILENT | {"volume delete"}
    for name, command in found.items():
        options = {option for parameter in command.params for option in parameter.opts}
        if name in _SILENT:
            assert not {"--output", "--quiet"} & options, name
        else:
            assert {"-o", "--output", "-q", "--quiet"} <= options, name
        assert ("--validate-only" in options) == (name in _PLANS), name


@pytest.fixture
def examples(server: ScriptedServer) -> ScriptedServer:
    """A server that answers every RPC with the examples; a watch ends after one event."""
    for module in (container_service_pb2, node_service_pb2, operation_service_pb2, volume_service_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                server.on(method.name, _answer(method))
    return server


def _answer(method: Any) -> Any:
    response = _filled(message_factory.GetMessageClass(method.output_type))

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        if getattr(request, "validate_only", False):
            yield type(response)(operation=Operation(plan=OperationPlan(stages=["stop"])))
            return
        yield response
        if method.name in {"WatchContainers", "WatchVolumes"}:
            await abort(context, grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")

    async def unary(request: Any, _: Context) -> Any:
        if method.name == "DeleteVolume" and request.validate_only:
            return type(response)(plan=Operation(plan=OperationPlan(stages=["engine-volume"])))
        return response

    return stream if method.server_streaming else unary


def _filled(kind: type[Any]) -> Any:
    """Return a response with an example in every field that can have one; of events, the result."""
    response = kind()
    for field in kind.DESCRIPTOR.fields:
        if field.message_type is None or (
            field.name in {"operation", "checkpoint"} and "event" in kind.DESCRIPTOR.oneofs_by_name
        ):
            continue
        if field.containing_oneof and field.name in {"modified", "deleted"}:
            continue
        example = _EXAMPLES.get(field.message_type.name)
        if field.message_type.name == "OperationResult":
            response.result.container.CopyFrom(messages.container())
        elif example is not None and field.is_repeated:
            getattr(response, field.name).append(example[0])
        elif example is not None:
            getattr(response, field.name).CopyFrom(example[0])
    return response


async def test_every_command_prints_json_yaml_tables_and_names(examples: ScriptedServer) -> None:
    forms = (("-o", "json"), ("-o", "yaml"), ("-o", "table"), ("-q",))
    lines = [[*path.split(), *form, *words.split()] for path, (words, _) in _SHOWING.items() for form in forms]
    results = iter(await run_all(examples.address, lines))
    for path, (_, kind) in _SHOWING.items():
        as_json, as_yaml, as_table, names = (next(results) for _ in forms)
        code = 1 if path in _WATCHES else 0
        for result in (as_json, as_yaml, as_table, names):
            assert result.code == code, (path, result)
        assert names.out == f"{_EXAMPLES[kind][1]}\n", (path, names)
        shown = json.loads(as_json.out)
        assert list(yaml.safe_load_all(as_yaml.out)) == [shown], path
        assert isinstance(shown, list) == (path in _LISTS), path
        only = shown[0] if path in _LISTS else shown
        assert only.items() >= {"event": "added", "resume_token": ""}.items() if path in _WATCHES else only, path
        assert not as_table.out.startswith(("{", "[", "-")), path
        assert len(as_table.out.splitlines()) > 1, path


async def test_a_plan_is_printed_in_every_format_but_has_no_name(examples: ScriptedServer) -> None:
    words = {**{path: _SHOWING[path][0] for path in _PLANS - {"volume delete"}}, "volume delete": "data"}
    forms = (("-o", "json"), ("-o", "yaml"), ("-o", "table"), ("-q",))
    lines = [
        [*path.split(), "--validate-only", *form, *words[path].split()] for path in sorted(_PLANS) for form in forms
    ]
    results = iter(await run_all(examples.address, lines))
    for path in sorted(_PLANS):
        as_json, as_yaml, as_table, names = (next(results) for _ in forms)
        stages = ["engine-volume"] if path == "volume delete" else ["stop"]
        assert json.loads(as_json.out)["stages"] == stages, (path, as_json)
        assert yaml.safe_load(as_yaml.out) == json.loads(as_json.out), path
        assert as_table.out.split()[:2] == ["stages:", *stages], (path, as_table)
        assert (names.code, names.out) == (2, ""), path
        assert "-q cannot be combined with --validate-only: a plan has no name" in names.err, path


@pytest.mark.parametrize(
    ("words", "format_name"),
    [
        (["-o", "json", "ps", "-q"], "json"),
        (["ps", "-o", "yaml", "-q"], "yaml"),
        (["inspect", "-q", "-o", "json", "train"], "json"),
    ],
)
def test_names_only_cannot_be_combined_with_a_format(words: list[str], format_name: str) -> None:
    result = CliRunner().invoke(main, ["--address", "/nowhere", *words])
    assert result.exit_code == 2
    assert f"-q prints names only; it cannot be combined with -o {format_name}" in result.output


async def test_an_empty_list_is_printed(server: ScriptedServer) -> None:
    server.on("ListContainers", reply_with(container_service_pb2.ListContainersResponse()))
    forms = (["ps", "-q"], ["ps", "-o", "yaml"], ["ps", "-o", "json"], ["ps"])
    names, as_yaml, as_json, as_table = await run_all(server.address, [list(form) for form in forms])
    assert (names.out, as_yaml.out, as_json.out) == ("", "[]\n", "[]\n")
    assert as_table.out.startswith("NAME  STATE")


_LONG = {
    "name": "training-run-of-the-third-week",
    "image": "registry.example.com:5000/team/department/models/language:v1.2.3-with-a-long-tag",
}


def _long_container() -> Container:
    long = messages.container(_LONG["name"])
    long.spec.image = _LONG["image"]
    for number in range(8):
        long.status.ports.add(container_port=80 + number, host_port=40001 + number, protocol=PORT_PROTOCOL_TCP)
    return long


async def _at_terminal(address: str, columns: int, *words: str, **environment: str) -> list[str]:
    """Return the lines that a command prints at a terminal of this width, without colours."""
    ours, theirs = pty.openpty()
    set_size(theirs, columns, 30)
    env = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "NO_COLOR"}}
    process = await spawn(address, *words, stdout=theirs, env=env | {"TERM": "xterm"} | environment)
    os.close(theirs)
    try:
        text = await asyncio.wait_for(asyncio.to_thread(_read_all, ours), limit(DEADLINE))
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 0
    finally:
        os.close(ours)
    return re.sub(rb"\x1b\[[0-9;]*m", b"", text).decode().splitlines()


def _read_all(fd: int) -> bytes:
    text = b""
    while True:
        try:
            part = os.read(fd, 4096)
        except OSError:  # the other side is closed
            return text
        if not part:
            return text
        text += part


@pytest.mark.parametrize("words", ["ps", "get train", "operations list", "gpus", "drift", "volume list"])
async def test_a_table_fits_the_terminal_without_losing_text(server: ScriptedServer, words: str) -> None:
    long = _long_container()
    server.on("ListContainers", reply_with(container_service_pb2.ListContainersResponse(containers=[long] * 2)))
    server.on("GetContainer", reply_with(container_service_pb2.GetContainerResponse(container=long)))
    operation = messages.operation()
    operation.target.name, operation.stage = _LONG["name"], "synchronize-the-files"
    server.on("ListOperations", reply_with(operation_service_pb2.ListOperationsResponse(operations=[operation])))
    gpu = Gpu(uuid=f"GPU-{messages.OPERATION_ID}", name="NVIDIA H100 80GB HBM3", container=_LONG["name"])
    server.on("ListGpus", reply_with(node_service_pb2.ListGpusResponse(gpus=[gpu])))
    drift = Drift(container=_LONG["name"], message="the restart policy was changed " * 4, plan="it is tried again " * 3)
    server.on("ListDrift", reply_with(node_service_pb2.ListDriftResponse(drift=[drift])))
    volume = messages.volume("data", *(f"{_LONG['name']}-{number}" for number in range(4)))
    server.on("ListVolumes", reply_with(volume_service_pb2.ListVolumesResponse(volumes=[volume])))
    piped = (await run(server.address, *words.split())).out.splitlines()
    shown = await _at_terminal(server.address, 80, *words.split())
    assert max(map(len, shown)) <= 80
    assert len(shown) > len(piped), "something had to wrap"
    # A long cell continues in the lines below, next to other cells.
    assert sorted("".join(shown).replace(" ", "")) == sorted("".join(piped).replace(" ", ""))
    if words in {"ps", "operations list", "volume list"}:
        assert piped[1].split()[0] in "\n".join(shown), "the name is split over lines"


async def test_a_wide_terminal_shows_each_container_in_one_line(server: ScriptedServer) -> None:
    answer = container_service_pb2.ListContainersResponse(containers=[_long_container()] * 2)
    server.on("ListContainers", reply_with(answer))
    shown = await _at_terminal(server.address, 400, "ps")
    assert shown == (await run(server.address, "ps")).out.splitlines()
    assert len(shown) == 3


async def test_a_pipe_gets_one_line_for_each_container_for_any_columns(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    answer = container_service_pb2.ListContainersResponse(containers=[_long_container()] * 2)
    server.on("ListContainers", reply_with(answer))
    header, *rows = (await run(server.address, "ps")).out.splitlines()
    assert header.split()[0] == "NAME"
    assert len(rows) == 2
    assert _LONG["image"] in rows[0]
    assert [row[header.index("IMAGE") :].split()[0] for row in rows] == [_LONG["image"]] * 2


async def test_a_watch_fits_the_terminal(server: ScriptedServer) -> None:
    async def changes(_: Any, context: Context) -> AsyncIterator[Any]:
        busy = _long_container()
        busy.status.operation_id = messages.OPERATION_ID
        yield messages.watch_event("t1", added=busy)
        await abort(context, grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")

    server.on("WatchContainers", changes)
    ours, theirs = pty.openpty()
    set_size(theirs, 80, 30)
    process = await spawn(server.address, "watch", stdout=theirs, env=os.environ | {"TERM": "dumb"})
    os.close(theirs)
    text = await asyncio.wait_for(asyncio.to_thread(_read_all, ours), limit(DEADLINE))
    os.close(ours)
    assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 1
    header, *lines = text.decode().splitlines()
    assert max(len(header), *map(len, lines)) <= 80
    assert "".join(line[header.index("OPERATION") :].strip() for line in lines) == messages.OPERATION_ID
    name = "".join(line[header.index("NAME") : header.index("STATE")].strip() for line in lines)
    assert name == _LONG["name"]
