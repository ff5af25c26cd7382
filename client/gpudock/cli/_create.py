"""`gpudock create` and `gpudock run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, Unpack

import click

from gpudock import Client, Container, OperationCall, OperationPlan
from gpudock._enums import enum_names
from gpudock._spec import spec_of
from gpudock.cli import _views
from gpudock.cli._arguments import Positive
from gpudock.cli._confirm_change import validate_only_option
from gpudock.cli._gpu_options import gpu_choice
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._spec_options import SpecFlags, spec_fields, spec_options
from gpudock.cli._wait import follow
from gpudock.v1.container_service_pb2 import PullPolicy

F = TypeVar("F", bound=Callable[..., Any])


class _CommonFlags(SpecFlags):
    """The parsed options of both commands."""

    image: str
    owner: str
    pull: str
    pull_stall_timeout: float | None
    validate_only: bool


class _CreateFlags(_CommonFlags):
    """The parsed options of `create`."""

    name: str
    create_only: bool


class _RunFlags(_CommonFlags):
    """The parsed options of `run`."""

    name: str | None
    detach: bool
    remove: bool


_owner_option = click.option("--owner", default="", help="Set the owner, which lists can filter by.")
_pull_stall_option = click.option(
    "--pull-stall-timeout",
    type=Positive(),
    metavar="SECONDS",
    help="Fail if the pull makes no progress for this time.",
)
_pull_option = click.option(
    "--pull",
    type=click.Choice(enum_names(PullPolicy)),
    default="missing",
    show_default=True,
    help="When to pull the image.",
)


@click.command()
@click.argument("name")
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@spec_options
@_owner_option
@_pull_option
@_pull_stall_option
@click.option("--create-only", is_flag=True, help="Create the container without starting it.")
@validate_only_option
@output_options()
def create(session: Session, **flags: Unpack[_CreateFlags]) -> None:
    """Create a container and start it.

    Write COMMAND after `--`: gpudock create train pytorch/pytorch --gpus 2 -- python train.py --epochs 3
    """
    _create(session, flags["name"], flags, create_only=flags["create_only"])


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--name", help="Name the container. Required.")
@click.option("-d", "--detach", is_flag=True, help="Run the container in the background. Required.")
@click.option("--rm", "remove", is_flag=True, help="Not supported: a container exists until `gpudock rm` deletes it.")
@spec_options
@_owner_option
@_pull_option
@_pull_stall_option
@validate_only_option
@output_options()
def run(session: Session, **flags: Unpack[_RunFlags]) -> None:
    """Create a container and start it, with the arguments of `docker run`.

    Example: gpudock run -d --name train --gpus 2 pytorch/pytorch python train.py
    """
    if flags["remove"]:
        raise click.UsageError(
            "--rm is not supported: a container keeps its files when its process ends; delete it with `gpudock rm`"
        )
    if not flags["detach"]:
        raise click.UsageError(
            "gpudock run cannot attach to the process: use -d to run it in the background, and then"
            " `gpudock exec -it NAME -- sh`"
        )
    if not flags["name"]:
        raise click.UsageError("--name is required: gpudock does not generate names")
    _create(session, flags["name"], flags, create_only=False)


def _create(session: Session, name: str, flags: _CommonFlags, *, create_only: bool) -> None:
    choice = gpu_choice(flags)
    spec = spec_of(flags["image"], spec_fields(flags))  # type: ignore[arg-type] # fields of a spec, by name

    async def begin(client: Client) -> OperationCall[Container]:
        if choice is not None:
            spec.gpus.CopyFrom(await choice.request(client))
        return client.containers.create(
            name,
            spec,
            owner=flags["owner"],
            pull=flags["pull"],
            pull_stall_timeout=flags["pull_stall_timeout"],
            create_only=create_only,
            validate_only=flags["validate_only"],
        )

    async def planned(client: Client) -> OperationPlan:
        return await (await begin(client)).plan()

    async def made(client: Client) -> Container:
        return await follow(await begin(client), name)

    if flags["validate_only"]:
        session.show_plan(planned)
        return
    session.output.row(session.run(made), _views.CONTAINER)
