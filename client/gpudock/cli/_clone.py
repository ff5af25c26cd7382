"""`gpudock clone`."""

from __future__ import annotations

from typing import Any, Unpack

import click

from gpudock import Client, Container, OperationCall
from gpudock.cli import _operation_views, _views
from gpudock.cli._arguments import REVISION_NUMBER
from gpudock.cli._follow import follow
from gpudock.cli._session import Session
from gpudock.cli._spec_options import SpecFlags, changes_of_flags, clear_option, spec_options


class _Flags(SpecFlags):
    """The options as click hands them over."""

    source: str
    name: str
    revision: int | None
    clear: tuple[str, ...]
    owner: str
    create_only: bool
    validate_only: bool


@click.command()
@click.argument("source")
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--revision", type=REVISION_NUMBER, help="As it was then; without it as it is now.")
@spec_options
@clear_option
@click.option("--owner", default="", help="Who it belongs to; without it the owner of the source.")
@click.option("--create-only", is_flag=True, help="Do not start it.")
@click.option("--validate-only", is_flag=True, help="Show what would be done, and do nothing.")
@click.pass_obj
def clone(session: Session, **flags: Unpack[_Flags]) -> None:
    """Create a container NAME from SOURCE, with its spec and a copy of its files.

    Each option takes the place of all that the source has of its kind. COMMAND stands after `--`.
    """
    changes = changes_of_flags(flags, flags["clear"])
    if flags["validate_only"]:
        plan = session.run(lambda client: _begin(client, flags, changes).plan())
        session.show(plan, _operation_views.plan)
        return
    made = session.run(lambda client: follow(_begin(client, flags, changes), flags["name"]))
    session.show(made, _views.one_container)


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
