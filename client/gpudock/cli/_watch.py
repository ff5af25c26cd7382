"""`gpudock watch`."""

from __future__ import annotations

import json
from contextlib import aclosing
from datetime import datetime

import click

from gpudock import Client, Container, ContainerState, WatchEvent
from gpudock._enums import words_of
from gpudock.cli._arguments import LabelFilter
from gpudock.cli._session import Session, plain
from gpudock.cli._views import watched

_HEADERS = ("TIME", "EVENT", "NAME", "STATE", "GPUS", "REVISION", "OPERATION")


@click.command()
@click.option("--state", type=click.Choice(words_of(ContainerState)), multiple=True, help="Only those in this state.")
@click.option("--label", type=LabelFilter(), multiple=True, help="Only those with this label.")
@click.option("--owner", default="", help="Only those of this owner.")
@click.option("--node", default="", help="Only those on this node.")
@click.option("--resume-token", default="", help="Go on behind the event that had this token (see -o json).")
@click.option("--changes-only", is_flag=True, help="Leave out what is there now.")
@click.pass_obj
def watch(
    session: Session,
    *,
    state: tuple[str, ...],
    label: tuple[tuple[str, str], ...],
    owner: str,
    node: str,
    resume_token: str,
    changes_only: bool,
) -> None:
    """Show containers as they come, change and go, a line for each, until interrupted.

    With -o json each line is an object, and checkpoints are shown as well: their resume_token is the one to keep when
    nothing else happens.
    """

    async def follow(client: Client) -> None:
        changes = client.containers.watch(
            states=state,
            labels=dict(label),
            owner=owner,
            node=node,
            resume_token=resume_token,
            changes_only=changes_only,
            checkpoints=session.as_json,
        )
        if not session.as_json:
            click.echo(watched(_HEADERS))
        async with aclosing(changes):
            async for event in changes:
                click.echo(_line(event) if session.as_json else watched(_cells(event)))

    session.run(follow)


def _line(event: WatchEvent[Container]) -> str:
    shown: dict[str, object] = {"event": event.kind, "resume_token": event.resume_token}
    if event.item is not None:
        shown["container"] = plain(event.item)
    else:
        shown["list_complete"] = event.list_complete
    return json.dumps(shown)


def _cells(event: WatchEvent[Container]) -> tuple[str, ...]:
    item = event.item or Container()
    return (
        datetime.now().astimezone().strftime("%H:%M:%S"),
        event.kind,
        item.name,
        ContainerState.Name(item.status.state).removeprefix("CONTAINER_STATE_"),
        str(len(item.status.gpu_uuids)),
        str(item.revision),
        item.status.operation_id,
    )
