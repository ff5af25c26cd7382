"""The commands for volumes."""

from __future__ import annotations

from collections.abc import Callable

import click

from gpudock import Client, OperationCall, OperationPlan, Volume, VolumeBackend, Watch
from gpudock._enums import enum_names
from gpudock.cli import _volume_views
from gpudock.cli._arguments import KeyValueParameter, LabelFilter, Size
from gpudock.cli._completion import volume_argument
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._wait import follow, wait_for
from gpudock.cli._watch import WatchFormat, changes_only_option, print_watch, resume_token_option, with_checkpoints

_backend_option = click.option(
    "--backend", type=click.Choice(enum_names(VolumeBackend)), default=None, help="Store the volume with this backend."
)
_owner_option = click.option("--owner", default="", help="Set the owner, which lists can filter by.")
_labels_option = click.option("--label", type=KeyValueParameter(), multiple=True, help="Set a label.")
_plan_option = click.option("--validate-only", is_flag=True, help="Print the plan and change nothing.")
_CHANGES = WatchFormat("volume", _volume_views.VOLUME, _volume_views.WATCH_COLUMNS, _volume_views.watch_cells)


@click.group()
def volume() -> None:
    """Manage volumes."""


@volume.command()
@click.argument("name")
@click.argument("size", type=Size(), required=False, default=None)
@_backend_option
@_owner_option
@_labels_option
@output_options()
def create(
    session: Session,
    *,
    name: str,
    size: int | None,
    backend: str | None,
    owner: str,
    label: tuple[tuple[str, str], ...],
) -> None:
    """Create a volume; without SIZE it may grow until the disk of the node is full."""
    made = session.run(
        lambda client: wait_for(
            client.volumes.create(name, size or 0, backend=backend or "", owner=owner, labels=dict(label)), name
        )
    )
    session.output.row(made, _volume_views.VOLUME)


@volume.command("list")
@click.option("--label", type=LabelFilter(), multiple=True, help="Show only volumes with this label.")
@click.option("--owner", default="", help="Show only volumes of this owner.")
@click.option("--node", default="", help="Show only volumes on this node.")
@output_options()
def list_volumes(session: Session, *, label: tuple[tuple[str, str], ...], owner: str, node: str) -> None:
    """List volumes."""
    found = session.run(lambda client: client.volumes.list(labels=dict(label), owner=owner, node=node))
    session.output.table(found, _volume_views.VOLUME)


@volume.command()
@click.option("--label", type=LabelFilter(), multiple=True, help="Show only volumes with this label.")
@click.option("--owner", default="", help="Show only volumes of this owner.")
@click.option("--node", default="", help="Show only volumes on this node.")
@resume_token_option
@changes_only_option
@output_options()
def watch(
    session: Session,
    *,
    label: tuple[tuple[str, str], ...],
    owner: str,
    node: str,
    resume_token: str,
    changes_only: bool,
) -> None:
    """Show changes of volumes and of who mounts them, a line for each, until interrupted.

    With -o json each line is an object; with -o yaml each is a document. Both show checkpoints too: keep the newest
    resume_token, also while nothing else happens.
    """

    def begin(client: Client) -> Watch[Volume]:
        return client.volumes.watch(
            labels=dict(label),
            owner=owner,
            node=node,
            resume_token=resume_token,
            changes_only=changes_only,
            checkpoints=with_checkpoints(session),
        )

    print_watch(session, begin, _CHANGES)


@volume.command()
@volume_argument
@output_options()
def get(session: Session, *, name: str) -> None:
    """Show a volume."""
    session.output.details(session.run(lambda client: client.volumes.get(name)), _volume_views.VOLUME)


@volume.command()
@volume_argument
@click.argument("size", type=Size())
@_plan_option
@output_options()
def resize(session: Session, *, name: str, size: int, validate_only: bool) -> None:
    """Resize a volume, also while containers use it."""
    _operate(session, lambda client: client.volumes.resize(name, size, validate_only=validate_only), validate_only)


@volume.command()
@volume_argument
@click.option(
    "--force", is_flag=True, help="Delete even if stopped containers mount it: remove the mount from their specs."
)
@_plan_option
@output_options()
def delete(session: Session, *, name: str, force: bool, validate_only: bool) -> None:
    """Delete a volume and its files."""
    if validate_only:
        session.show_plan(lambda client: _plan_of_delete(client, name, force=force))
        return
    session.run(lambda client: wait_for(client.volumes.delete(name, force=force), name))


@volume.command()
@click.argument("name")
@click.argument("engine_volume", default="")
@click.option("--size", type=Size(), default=None, help="Copy the files into a volume of this size.")
@_backend_option
@_owner_option
@_labels_option
@_plan_option
@output_options()
def adopt(
    session: Session,
    *,
    name: str,
    engine_volume: str,
    size: int | None,
    backend: str | None,
    owner: str,
    label: tuple[tuple[str, str], ...],
    validate_only: bool,
) -> None:
    """Adopt a volume of the engine, as it is or copied to one with --size."""

    def begin(client: Client) -> OperationCall[Volume]:
        return client.volumes.adopt(
            name,
            engine_volume,
            size_bytes=size or 0,
            backend=backend or "",
            owner=owner,
            labels=dict(label),
            validate_only=validate_only,
        )

    _operate(session, begin, validate_only)


@volume.command()
@volume_argument
@output_options()
def revisions(session: Session, *, name: str) -> None:
    """List the revisions of a volume with their sizes, oldest first."""
    session.output.table(session.run(lambda client: client.volumes.revisions(name)), _volume_views.VOLUME_REVISION)


async def _plan_of_delete(client: Client, name: str, *, force: bool) -> OperationPlan:
    return (await client.volumes.plan_delete(name, force=force)).plan


def _operate(session: Session, begin: Callable[[Client], OperationCall[Volume]], validate_only: bool) -> None:  # noqa: FBT001 - as the option has it
    if validate_only:
        session.show_plan(lambda client: begin(client).plan())
        return
    session.output.row(session.run(lambda client: follow(begin(client))), _volume_views.VOLUME)
