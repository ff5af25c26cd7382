"""The commands for operations."""

from __future__ import annotations

import click

from gpudock import Cancelled, Client, CommittedImage, OperationKind, OperationState, Volume
from gpudock._enums import enum_names
from gpudock.cli import _operation_views, _views, _volume_views
from gpudock.cli._completion import container_filter_option, operation_argument
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._wait import follow


@click.group()
def operations() -> None:
    """Manage operations."""


@operations.command("list")
@click.option(
    "--state", type=click.Choice(enum_names(OperationState)), multiple=True, help="Show only operations in this state."
)
@click.option(
    "--kind", type=click.Choice(enum_names(OperationKind)), multiple=True, help="Show only operations of this kind."
)
@container_filter_option
@click.option("--node", default="", help="Show only operations of this node.")
@output_options()
def list_operations(
    session: Session, *, state: tuple[str, ...], kind: tuple[str, ...], container: str, node: str
) -> None:
    """List operations, newest first."""
    found = session.run(lambda client: client.operations.list(states=state, kinds=kind, container=container, node=node))
    session.output.table(found, _operation_views.OPERATION)


@operations.command()
@operation_argument
@output_options()
def get(session: Session, *, operation_id: str) -> None:
    """Show an operation with its stages."""
    session.output.details(session.run(lambda client: client.operations.get(operation_id)), _operation_views.OPERATION)


@operations.command()
@operation_argument
@output_options()
def watch(session: Session, *, operation_id: str) -> None:
    """Show the progress of an operation until it ends."""
    result = session.run(lambda client: follow(client.operations.watch(operation_id)))
    if isinstance(result, CommittedImage):
        session.output.details(result, _views.COMMITTED_IMAGE)
    elif isinstance(result, Volume):
        session.output.row(result, _volume_views.VOLUME)
    elif result is not None:
        session.output.row(result, _views.CONTAINER)


@operations.command()
@operation_argument
@click.option("--wait", is_flag=True, help="Wait until the operation has ended.")
@output_options()
def cancel(session: Session, *, operation_id: str, wait: bool) -> None:
    """Cancel an operation and undo its changes."""
    operation = session.run(lambda client: client.operations.cancel(operation_id))
    if wait and not session.run(lambda client: _was_cancelled(client, operation_id)):
        click.echo(f"operation {operation_id} succeeded: it could no longer be cancelled", err=True)
    if wait:
        operation = session.run(lambda client: client.operations.get(operation_id))
    session.output.details(operation, _operation_views.OPERATION)


async def _was_cancelled(client: Client, operation_id: str) -> bool:
    try:
        await follow(client.operations.watch(operation_id))
    except Cancelled:
        return True
    return False
