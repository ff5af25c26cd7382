"""Errors of the command: one sentence, the next step, and suggestions for mistyped words."""

from __future__ import annotations

import re
import shlex

import click
import grpc
import pytest
from click.testing import CliRunner
from gpudock import ErrorReason, GpudockError
from gpudock.cli import main
from gpudock.cli._next_steps import NEXT_STEPS, next_step
from gpudock.errors import ErrorDetails

from tests.clients.command import run
from tests.clients.scripted_server import ScriptedServer, error_reply
from tests.rig.rig import REPOSITORY

_REASONS = [value.name.removeprefix("ERROR_REASON_") for value in ErrorReason.DESCRIPTOR.values if value.number]
# The messages of these errors say what to do.
_SELF_EXPLAINING = {
    *("INVALID_ARGUMENT", "REQUEST_ID_REUSED", "STALE_ETAG", "PERMISSION_DENIED", "ENGINE_REJECTED", "SHUTTING_DOWN"),
    *("DISK_FULL", "RECORD_UNREADABLE", "STORE_FULL", "WRONG_NODE", "START_FAILED", "LAYER_CARRY_FAILED"),
    *("SNAPSHOT_FAILED", "PORT_FORBIDDEN", "HEALTH_WATCH_LIMIT", "IMAGE_PULL_FAILED", "HOST_PATH_FORBIDDEN"),
    *("LIMIT_FORBIDDEN", "HOST_PATH_FAILED", "ADOPTION_FORBIDDEN", "SIZE_NOT_SUPPORTED", "VOLUME_FAILED"),
    *("SNAPSHOT_NOT_FOUND", "IMAGE_DIFFERS", "IMAGE_EXISTS", "IMAGE_NAME_FORBIDDEN", "RECOVERING"),
    *("OPERATION_CANCELLED", "OPERATION_OVERTAKEN", "VOLUME_DIFFERS", "EXEC_EXISTS", "EXEC_LIMIT"),
}
_PROTO = (REPOSITORY / "protos/gpudock/v1/error_reason.proto").read_text()


def test_every_reason_has_a_next_step_or_explains_itself() -> None:
    """A new reason must be added to exactly one of the two."""
    assert set(NEXT_STEPS) | _SELF_EXPLAINING == set(_REASONS)
    assert not set(NEXT_STEPS) & _SELF_EXPLAINING


@pytest.mark.parametrize("reason", sorted(NEXT_STEPS))
def test_a_next_step_uses_metadata_of_the_contract_and_an_existing_command(reason: str) -> None:
    comment = _PROTO.partition(f"ERROR_REASON_{reason} = ")[0].rpartition("// Metadata: ")[2]
    keys = re.findall(r"{(\w+)}", NEXT_STEPS[reason])
    assert all(re.search(rf"\b{key}\b", comment) for key in keys), (keys, comment)
    error = GpudockError("no", details=ErrorDetails(reason=reason, metadata=dict.fromkeys(keys, "a b")))
    step = next_step(error)
    assert step.startswith("next: ")
    assert "\n" not in step
    advised = re.search(r": gpudock (.+)$", step)
    if advised is None:
        return
    words = shlex.split(advised[1])
    context = main.make_context("gpudock", words)
    command: click.Command = main
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
        context = click.Context(command, parent=context, info_name=name)
    command.make_context(command.name, words, parent=context.parent)


async def test_an_error_is_one_sentence_and_the_next_step(server: ScriptedServer) -> None:
    missing = error_reply(
        grpc.StatusCode.NOT_FOUND,
        "REVISION_NOT_FOUND",
        "container 'train' has no revision 9",
        metadata={"container": "train"},
    )
    server.on("GetContainerRevision", missing)
    ended = await run(server.address, "revision", "get", "train", "9")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.splitlines() == [
        "error: REVISION_NOT_FOUND: container 'train' has no revision 9",
        "next: list the revisions: gpudock revisions train",
    ]


async def test_an_error_without_the_metadata_of_its_next_step_has_none(server: ScriptedServer) -> None:
    server.on("GetContainerRevision", error_reply(grpc.StatusCode.NOT_FOUND, "REVISION_NOT_FOUND", "no such revision"))
    assert (await run(server.address, "revision", "get", "train", "9")).err == (
        "error: REVISION_NOT_FOUND: no such revision\n"
    )


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        ("sclae train --gpus 1", "No such command 'sclae'. (Did you mean one of: 'clone', 'scale'?)"),
        ("volume lst", "No such command 'lst'. Did you mean 'list'?"),
        ("volumes list", "No such command 'volumes'. Did you mean 'volume'?"),
        ("operations wach 17", "No such command 'wach'. Did you mean 'watch'?"),
        ("create c i --gpuss 1", "No such option '--gpuss'. (Did you mean one of: '--cpus', '--gpu', '--gpus'?)"),
        ("ps --lable a", "No such option '--lable'. Did you mean '--label'?"),
        ("--adress x ps", "No such option '--adress'. Did you mean '--address'?"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(words: str, suggestion: str) -> None:
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2
    assert suggestion in result.output


def test_a_word_that_resembles_no_command_gets_no_suggestion() -> None:
    assert "Did you mean" not in CliRunner().invoke(main, ["xyzzy"]).output
