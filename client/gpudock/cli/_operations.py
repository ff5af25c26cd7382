"""`gpudock operations`."""

from __future__ import annotations

import click

from gpudock import Cancelled, Client, CommittedImage, OperationKind, OperationState, Volume
from gpudock._enums import enum_names
from gpudock.cli import _operation_views, _views, _volume_views
from gpudock.cli._session import Session
from gpudock.cli._wait import follow


@click.group()
def operations() -> None:
    """Show operations, and cancel them."""


@operations.command("list")
@click.option("--state", type=click.Choice(enum_names(OperationState)), multiple=True, help="Only those in this state.")
@click.option("--kind", type=click.Choice(enum_names(OperationKind)), multiple=True, help="Only those of this kind.")
@click.option("--container", default="", help="Only those on this container.")
@click.option("--node", default="", help="Only those of this node.")
@click.pass_obj
def list_operations(
    session: Session, *, state: tuple[str, ...], kind: tuple[str, ...], container: str, node: str
) -> None:
    """List operations, the newest first."""
    found = session.run(lambda client: client.operations.list(states=state, kinds=kind, container=container, node=node))
    session.show_all(found, _operation_views.operations)


@operations.command()
@click.argument("operation_id", metavar="ID")
@click.pass_obj
def get(session: Session, *, operation_id: str) -> None:
    """Show one operation with its stages."""
    session.show(session.run(lambda client: client.operations.get(operation_id)), _operation_views.operation)


@operations.command()
@click.argument("operation_id", metavar="ID")
@click.pass_obj
def watch(session: Session, *, operation_id: str) -> None:
    """Show an operation's progress until it has ended."""
    left = session.run(lambda client: follow(client.operations.watch(operation_id)))
    if isinstance(left, CommittedImage):
        session.show(left, _views.committed_image)
    elif isinstance(left, Volume):
        session.show(left, _volume_views.one_volume)
    elif left is not None:
        session.show(left, _views.one_container)


@operations.command()
@click.argument("operation_id", metavar="ID")
@click.option("--wait", is_flag=True, help="Wait until its work is undone.")
@click.pass_obj
def cancel(session: Session, *, operation_id: str, wait: bool) -> None:
    """Stop an operation, and undo what it did."""
    operation = session.run(lambda client: client.operations.cancel(operation_id))
    if wait and not session.run(lambda client: _was_cancelled(client, operation_id)):
        click.echo("it was past its point of no return, and has succeeded", err=True)
    if wait:
        operation = session.run(lambda client: client.operations.get(operation_id))
    session.show(operation, _operation_views.operation)


async def _was_cancelled(client: Client, operation_id: str) -> bool:
    try:
        await follow(client.operations.watch(operation_id))
    except Cancelled:
        return True
    return False
