"""`gpudock update`."""

from __future__ import annotations

from typing import Any, Unpack

import click

from gpudock import Client, Container, OperationCall
from gpudock._enums import words_of
from gpudock.cli import _operation_views, _views
from gpudock.cli._follow import follow
from gpudock.cli._session import Session
from gpudock.cli._snapshot_options import snapshots_option
from gpudock.cli._spec_options import SpecFlags, changes_of_flags, clear_option, spec_options
from gpudock.v1.container_service_pb2 import FilesPolicy, PullPolicy


class _Flags(SpecFlags):
    """The options as click hands them over."""

    name: str
    image: str | None
    files: str | None
    pull: str
    clear: tuple[str, ...]
    snapshots: str | None
    validate_only: bool


@click.command()
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--image", help="Another image; what becomes of the files is for --files to say.")
@spec_options
@clear_option
@click.option(
    "--files",
    type=click.Choice(words_of(FilesPolicy)),
    help="On another image: lay the files on top of it, or begin anew with its own.",
)
@click.option(
    "--pull",
    type=click.Choice(words_of(PullPolicy)),
    default="missing",
    show_default=True,
    help="Whether the image is pulled first.",
)
@snapshots_option
@click.option("--validate-only", is_flag=True, help="Show what would be done, and do nothing.")
@click.pass_obj
def update(session: Session, **flags: Unpack[_Flags]) -> None:
    """Change what a container is to be; its files stay.

    Each option takes the place of all that the container has of its kind: with -e A=1 that is its one variable.
    COMMAND stands after `--`: gpudock update train -e LR=0.1 -- python train.py
    """
    changes = _changes(flags)
    if not changes:
        raise click.UsageError("nothing to change: give --image, --env, --publish, --clear or another option")
    if flags["validate_only"]:
        plan = session.run(lambda client: _begin(client, flags, changes).plan())
        session.show(plan, _operation_views.plan)
        return
    updated = session.run(lambda client: follow(_begin(client, flags, changes), flags["name"]))
    session.show(updated, _views.one_container)


def _changes(flags: _Flags) -> dict[str, Any]:
    """The fields of the spec that change, with their values."""
    changes = changes_of_flags(flags, flags["clear"])
    return changes if flags["image"] is None else {"image": flags["image"], **changes}


def _begin(client: Client, flags: _Flags, changes: dict[str, Any]) -> OperationCall[Container]:
    return client.containers.update(
        flags["name"],
        files=flags["files"],
        pull=flags["pull"],
        snapshots=flags["snapshots"],
        validate_only=flags["validate_only"],
        **changes,
    )
