"""The commands for a container's history."""

from __future__ import annotations

import click

from gpudock import Client, Container, OperationCall
from gpudock.cli import _operation_views, _revision_views, _views
from gpudock.cli._arguments import REVISION_NUMBER
from gpudock.cli._follow import follow, settled
from gpudock.cli._session import Session
from gpudock.cli._snapshot_options import snapshots_option


@click.command()
@click.argument("name")
@click.argument("revision", type=REVISION_NUMBER)
@click.option("--spec-only", is_flag=True, help="Leave the files as they are today.")
@snapshots_option
@click.option("--validate-only", is_flag=True, help="Show what would be done, and do nothing.")
@click.pass_obj
def rollback(
    session: Session, *, name: str, revision: int, spec_only: bool, snapshots: str | None, validate_only: bool
) -> None:
    """Return a container to one of its revisions: its spec, and its files as they were then."""

    def begin(client: Client) -> OperationCall[Container]:
        return client.containers.rollback(
            name, revision, spec_only=spec_only, snapshots=snapshots, validate_only=validate_only
        )

    if validate_only:
        session.show(session.run(lambda client: begin(client).plan()), _operation_views.plan)
        return
    session.show(session.run(lambda client: follow(begin(client), name)), _views.one_container)


@click.command()
@click.argument("name")
@click.pass_obj
def revisions(session: Session, *, name: str) -> None:
    """List a container's revisions, oldest first; `*` marks the current one."""
    found = session.run(lambda client: client.containers.revisions(name))
    session.show_all(found, _revision_views.revisions)


@click.group()
def revision() -> None:
    """Look at one revision of a container, and delete it."""


@revision.command()
@click.argument("name")
@click.argument("number", metavar="REVISION", type=REVISION_NUMBER, required=False, default=None)
@click.pass_obj
def get(session: Session, *, name: str, number: int | None) -> None:
    """Show one revision; without its number the current one."""
    found = session.run(lambda client: client.containers.revision(name, number or 0))
    session.show(found, _revision_views.revision)


@revision.command()
@click.argument("name")
@click.argument("number", metavar="REVISION", type=REVISION_NUMBER)
@click.pass_obj
def delete(session: Session, *, name: str, number: int) -> None:
    """Delete a revision with the files that were kept of it."""
    session.run(lambda client: settled(client.containers.delete_revision(name, number), name))
