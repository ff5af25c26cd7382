"""`gpudock watch`, and how a watch is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

import click
from google.protobuf.message import Message

from gpudock import Client, Container, ContainerState, Watch, WatchEvent
from gpudock._enums import enum_names
from gpudock.cli import _views
from gpudock.cli._arguments import LabelFilter
from gpudock.cli._output import TABLE, Output, View, message_dict, output_options, serialized
from gpudock.cli._session import Session
from gpudock.cli._tables import stream_row

T = TypeVar("T", bound=Message)

# Widths of the columns TIME and EVENT, in characters.
_WIDTHS = (8, 8)

resume_token_option = click.option(
    "--resume-token", default="", help="Continue after the event with this token, which -o json shows."
)
changes_only_option = click.option("--changes-only", is_flag=True, help="Do not show what exists at the beginning.")


@dataclass(frozen=True, slots=True)
class WatchFormat(Generic[T]):
    """How the objects of a watch are shown: under this field of JSON, or in columns of these widths in characters."""

    field: str
    view: View[T]
    columns: Mapping[str, int]
    cells: Callable[[T], tuple[str, ...]]

    def line(self, time: str, event: str, cells: Sequence[str]) -> str:
        """Return one line of the table; the columns have fixed widths, since later lines are not known yet."""
        return stream_row((time, event, *cells), (*_WIDTHS, *self.columns.values()))


@click.command()
@click.option(
    "--state", type=click.Choice(enum_names(ContainerState)), multiple=True, help="Show only containers in this state."
)
@click.option("--label", type=LabelFilter(), multiple=True, help="Show only containers with this label.")
@click.option("--owner", default="", help="Show only containers of this owner.")
@click.option("--node", default="", help="Show only containers on this node.")
@resume_token_option
@changes_only_option
@output_options()
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
    """Show changes of containers, a line for each, until interrupted.

    With -o json each line is an object; with -o yaml each is a document. Both show checkpoints too: keep the newest
    resume_token, also while nothing else happens.
    """

    def begin(client: Client) -> Watch[Container]:
        return client.containers.watch(
            states=state,
            labels=dict(label),
            owner=owner,
            node=node,
            resume_token=resume_token,
            changes_only=changes_only,
            checkpoints=with_checkpoints(session),
        )

    print_watch(session, begin, _CONTAINERS)


def with_checkpoints(session: Session) -> bool:
    """Return whether a watch is to ask for checkpoints: only JSON and YAML show them."""
    return session.output.format != TABLE


def print_watch(session: Session, begin: Callable[[Client], Watch[T]], shown: WatchFormat[T]) -> None:
    """Print a line for each event until interrupted; `begin` starts the watch."""
    output = session.output

    async def follow(client: Client) -> None:
        changes = begin(client)
        if output.format == TABLE and not output.names_only:
            click.echo(shown.line("TIME", "EVENT", tuple(shown.columns)))
        async with aclosing(changes):
            async for event in changes:
                _print_event(event, shown, output)

    session.run(follow)


def _print_event(event: WatchEvent[T], shown: WatchFormat[T], output: Output) -> None:
    if output.format != TABLE:
        click.echo(serialized(_event_dict(event, shown), output.format, compact=True), nl=False)
    elif event.item is not None:
        name, cells = shown.view.name(event.item), shown.cells(event.item)
        now = datetime.now().astimezone().strftime("%H:%M:%S")
        click.echo(name if output.names_only else shown.line(now, event.kind, cells))


def _event_dict(event: WatchEvent[T], shown: WatchFormat[T]) -> dict[str, object]:
    line: dict[str, object] = {"event": event.kind, "resume_token": event.resume_token}
    if event.item is not None:
        return line | {shown.field: message_dict(event.item)}
    return line | {"list_complete": event.list_complete}


def _container_cells(item: Container) -> tuple[str, ...]:
    return (
        item.name,
        ContainerState.Name(item.status.state).removeprefix("CONTAINER_STATE_"),
        str(len(item.status.gpu_uuids)),
        str(item.revision),
        item.status.operation_id,
    )


_CONTAINERS = WatchFormat(
    "container",
    _views.CONTAINER,
    {"NAME": 24, "STATE": 8, "GPUS": 4, "REVISION": 8, "OPERATION": 36},
    _container_cells,
)
