"""Changes of a container: printing the plan, or making the change after a confirmation of the restart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

import click

from gpudock import Client, Container, OperationCall, OperationPlan
from gpudock.cli import _operation_views, _views
from gpudock.cli._session import Session
from gpudock.cli._wait import follow

F = TypeVar("F", bound=Callable[..., object])


class Begin(Protocol):
    """Calls the RPC of a change."""

    def __call__(self, client: Client, *, validate_only: bool, etag: str) -> OperationCall[Container]: ...


validate_only_option = click.option(
    "--validate-only", is_flag=True, help="Print the plan and the changes of the spec, and change nothing."
)
yes_option = click.option(
    "-y",
    "--yes",
    is_flag=True,
    help="Restart the process without confirmation. Without a terminal there is no confirmation.",
)


def change(session: Session, name: str, begin: Begin, *, etag: str = "", validate_only: bool, yes: bool) -> None:
    """Change the container `name` and print it; with `validate_only` print the plan alone."""
    if validate_only:
        session.show_plan(lambda client: begin(client, validate_only=True, etag=etag).plan())
        return
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        etag = _confirm_restart(session, name, begin, etag)
    changed = session.run(lambda client: follow(begin(client, validate_only=False, etag=etag), name))
    session.output.row(changed, _views.CONTAINER)


def _confirm_restart(session: Session, name: str, begin: Begin, etag: str) -> str:
    """Ask for confirmation if the change restarts the process; return the etag that the plan was made for."""

    async def planned(client: Client) -> tuple[OperationPlan, str]:
        current = etag or (await client.containers.get(name)).etag
        return await begin(client, validate_only=True, etag=current).plan(), current

    plan, current = session.run(planned)
    if plan.restarts_process:
        changes = _operation_views.spec_changes(plan.spec_changes)
        click.echo(f"{changes}\n" if changes else "", nl=False, err=True)
        if not click.confirm(f"This stops and restarts the process of {name}. Continue?", err=True):
            click.echo("nothing changed", err=True)
            sys.exit(1)
    return current
