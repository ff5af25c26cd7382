"""The commands for the revisions of a container."""

from __future__ import annotations

import click
import grpc

from gpudock import Client, Container, NotFound, OperationCall
from gpudock.cli import _revision_views
from gpudock.cli._arguments import REVISION_NUMBER
from gpudock.cli._completion import complete_revisions, container_argument
from gpudock.cli._confirm_change import change, validate_only_option, yes_option
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._snapshot_options import snapshots_option
from gpudock.cli._wait import wait_for


@click.command()
@container_argument
@click.argument("revision", type=REVISION_NUMBER, required=False, default=None, shell_complete=complete_revisions)
@click.option("--spec-only", is_flag=True, help="Restore the spec only; keep the current files.")
@snapshots_option
@validate_only_option
@yes_option
@output_options()
def rollback(
    session: Session,
    *,
    name: str,
    revision: int | None,
    spec_only: bool,
    snapshots: str | None,
    validate_only: bool,
    yes: bool,
) -> None:
    """Restore the spec and the files of a revision.

    Without REVISION, restore the one before the current revision.
    """
    number, etag = session.run(lambda client: _target(client, name, revision))

    def begin(client: Client, *, validate_only: bool, etag: str) -> OperationCall[Container]:
        return client.containers.rollback(
            name, number, spec_only=spec_only, snapshots=snapshots, validate_only=validate_only, etag=etag
        )

    change(session, name, begin, etag=etag, validate_only=validate_only, yes=yes)


async def _target(client: Client, name: str, revision: int | None) -> tuple[int, str]:
    """Return the revision to restore, and the etag of the container for which it was chosen (empty if it was given)."""
    if revision is not None:
        return revision, ""
    container = await client.containers.get(name)
    earlier = [one.revision for one in await client.containers.revisions(name) if one.revision < container.revision]
    if not earlier:
        raise NotFound(
            f"container {name!r} has no revision before the current revision {container.revision}",
            code=grpc.StatusCode.NOT_FOUND,
        )
    click.echo(f"rolling back to revision {max(earlier)}", err=True)
    return max(earlier), container.etag


@click.command()
@container_argument
@output_options()
def revisions(session: Session, *, name: str) -> None:
    """List the revisions of a container, oldest first; `*` marks the current one."""
    found = session.run(lambda client: client.containers.revisions(name))
    session.output.table(found, _revision_views.REVISION)


@click.group()
def revision() -> None:
    """Manage one revision of a container."""


@revision.command()
@container_argument
@click.argument(
    "number", metavar="REVISION", type=REVISION_NUMBER, shell_complete=complete_revisions, required=False, default=None
)
@output_options()
def get(session: Session, *, name: str, number: int | None) -> None:
    """Show a revision; without REVISION, the current one."""
    found = session.run(lambda client: client.containers.revision(name, number or 0))
    session.output.details(found, _revision_views.REVISION)


@revision.command()
@container_argument
@click.argument("number", metavar="REVISION", type=REVISION_NUMBER, shell_complete=complete_revisions)
@click.pass_obj
def delete(session: Session, *, name: str, number: int) -> None:
    """Delete a revision and its files."""
    session.run(lambda client: wait_for(client.containers.delete_revision(name, number), name))
