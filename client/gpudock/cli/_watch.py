"""`gpudock watch`, and how any watch is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

import click
from google.protobuf.message import Message

from gpudock import Client, Container, ContainerState, Watch, WatchEvent
from gpudock._enums import enum_names
from gpudock.cli._arguments import LabelFilter
from gpudock.cli._session import Session, message_dict

T = TypeVar("T", bound=Message)

# Of the time and the event.
_WIDTHS = (8, 8)

resume_token_option = click.option(
    "--resume-token", default="", help="Go on behind the event that had this token (see -o json)."
)
changes_only_option = click.option("--changes-only", is_flag=True, help="Leave out what is there now.")


@dataclass(frozen=True, slots=True)
class WatchFormat(Generic[T]):
    """How the objects of a watch are shown: as a field of this name, and in a table with columns of these widths."""

    field: str
    columns: Mapping[str, int]
    cells: Callable[[T], tuple[str, ...]]

    def line(self, time: str, event: str, cells: Sequence[str]) -> str:
        """A line of the table, which has no end, so that no column knows how wide it will be."""
        widths = (*_WIDTHS, *self.columns.values())
        return "  ".join(cell.ljust(width) for cell, width in zip((time, event, *cells), widths, strict=True)).rstrip()


@click.command()
@click.option("--state", type=click.Choice(enum_names(ContainerState)), multiple=True, help="Only those in this state.")
@click.option("--label", type=LabelFilter(), multiple=True, help="Only those with this label.")
@click.option("--owner", default="", help="Only those of this owner.")
@click.option("--node", default="", help="Only those on this node.")
@resume_token_option
@changes_only_option
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

    def begin(client: Client) -> Watch[Container]:
        return client.containers.watch(
            states=state,
            labels=dict(label),
            owner=owner,
            node=node,
            resume_token=resume_token,
            changes_only=changes_only,
            checkpoints=session.as_json,
        )

    print_watch(session, begin, _CONTAINERS)


def print_watch(session: Session, begin: Callable[[Client], Watch[T]], shown: WatchFormat[T]) -> None:
    """A line for each event, until interrupted; with -o json also for checkpoints, which `begin` then asks for."""

    async def follow(client: Client) -> None:
        changes = begin(client)
        if not session.as_json:
            click.echo(shown.line("TIME", "EVENT", tuple(shown.columns)))
        async with aclosing(changes):
            async for event in changes:
                click.echo(_json(event, shown) if session.as_json else _row(event, shown))

    session.run(follow)


def _json(event: WatchEvent[T], shown: WatchFormat[T]) -> str:
    line: dict[str, object] = {"event": event.kind, "resume_token": event.resume_token}
    if event.item is not None:
        line[shown.field] = message_dict(event.item)
    else:
        line["list_complete"] = event.list_complete
    return json.dumps(line)


def _row(event: WatchEvent[T], shown: WatchFormat[T]) -> str:
    cells = shown.cells(event.item) if event.item is not None else ("",) * len(shown.columns)
    return shown.line(datetime.now().astimezone().strftime("%H:%M:%S"), event.kind, cells)


def _container_cells(item: Container) -> tuple[str, ...]:
    return (
        item.name,
        ContainerState.Name(item.status.state).removeprefix("CONTAINER_STATE_"),
        str(len(item.status.gpu_uuids)),
        str(item.revision),
        item.status.operation_id,
    )


_CONTAINERS = WatchFormat(
    "container", {"NAME": 24, "STATE": 8, "GPUS": 4, "REVISION": 8, "OPERATION": 36}, _container_cells
)
