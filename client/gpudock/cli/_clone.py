"""`gpudock clone`."""

from __future__ import annotations

from typing import Any, Unpack

import click

from gpudock import Client, Container, OperationCall, OperationPlan
from gpudock.cli import _views
from gpudock.cli._arguments import REVISION_NUMBER
from gpudock.cli._completion import complete_containers, complete_revisions
from gpudock.cli._confirm_change import validate_only_option
from gpudock.cli._edit_options import EditFlags, change_arguments, edit_options
from gpudock.cli._gpu_options import gpu_choice
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._spec_options import SpecFlags, spec_field_parts, spec_fields, spec_options
from gpudock.cli._wait import follow


class _Flags(SpecFlags, EditFlags):
    """The parsed options."""

    source: str
    name: str
    revision: int | None
    owner: str
    create_only: bool
    validate_only: bool


@click.command()
@click.argument("source", shell_complete=complete_containers)
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--revision",
    type=REVISION_NUMBER,
    shell_complete=complete_revisions,
    help="Clone this revision instead of the current state.",
)
@spec_options
@edit_options
@click.option("--owner", default="", help="Set the owner; default: the owner of SOURCE.")
@click.option("--create-only", is_flag=True, help="Create the container without starting it.")
@validate_only_option
@output_options()
def clone(session: Session, **flags: Unpack[_Flags]) -> None:
    """Create a container with the spec of another one and a copy of its files.

    The options change the spec as in `gpudock update`. Write COMMAND after `--`.
    """
    given, parts, choice = spec_fields(flags), spec_field_parts(flags), gpu_choice(flags)
    # A usage error must end the command before anything is sent.
    change_arguments(given, parts, flags)

    async def begin(client: Client) -> OperationCall[Container]:
        if choice is None:
            return _begin(client, flags, change_arguments(given, parts, flags))
        source = await client.containers.revision(flags["source"], flags["revision"] or 0)
        gpus = await choice.request(client, present=source.spec.gpus)
        return _begin(client, flags, change_arguments({**given, "gpus": gpus}, parts, flags))

    async def planned(client: Client) -> OperationPlan:
        return await (await begin(client)).plan()

    async def made(client: Client) -> Container:
        return await follow(await begin(client), flags["name"])

    if flags["validate_only"]:
        session.show_plan(planned)
        return
    session.output.row(session.run(made), _views.CONTAINER)


def _begin(client: Client, flags: _Flags, changes: dict[str, Any]) -> OperationCall[Container]:
    return client.containers.clone(
        flags["source"],
        flags["name"],
        revision=flags["revision"] or 0,
        owner=flags["owner"],
        create_only=flags["create_only"],
        validate_only=flags["validate_only"],
        **changes,
    )
