"""The commands that only look."""

from __future__ import annotations

import click

from gpudock import ContainerState, DriftSeverity
from gpudock._enums import enum_names
from gpudock.cli import _views
from gpudock.cli._arguments import LabelFilter
from gpudock.cli._completion import container_argument, container_filter_option
from gpudock.cli._output import JSON, output_options
from gpudock.cli._session import Session


@click.command()
@container_argument
@output_options()
def get(session: Session, *, name: str) -> None:
    """Show one container."""
    session.output.details(session.run(lambda client: client.containers.get(name)), _views.CONTAINER)


@click.command()
@container_argument
@output_options(default=JSON)
def inspect(session: Session, *, name: str) -> None:
    """Show one container as JSON."""
    session.output.details(session.run(lambda client: client.containers.get(name)), _views.CONTAINER)


@click.command("list")
@click.option("--state", type=click.Choice(enum_names(ContainerState)), multiple=True, help="Only those in this state.")
@click.option("--label", type=LabelFilter(), multiple=True, help="Only those with this label.")
@click.option("--owner", default="", help="Only those of this owner.")
@click.option("--node", default="", help="Only those on this node.")
@output_options()
def list_containers(
    session: Session, *, state: tuple[str, ...], label: tuple[tuple[str, str], ...], owner: str, node: str
) -> None:
    """List containers."""
    found = session.run(lambda client: client.containers.list(states=state, labels=dict(label), owner=owner, node=node))
    session.output.table(found, _views.CONTAINER)


@click.command()
@click.option("--free", "claimed", flag_value=False, type=bool, default=None, help="Only those that nobody holds.")
@click.option("--held", "claimed", flag_value=True, type=bool, help="Only those that a container holds.")
@click.option("--model", default="", help="Only those with this in their name.")
@container_filter_option
@output_options()
def gpus(session: Session, *, claimed: bool | None, model: str, container: str) -> None:
    """List the node's GPUs, and who holds them."""
    found = session.run(lambda client: client.node.gpus(claimed=claimed, model=model, container=container))
    session.output.table(found, _views.GPU)


@click.command()
@container_filter_option
@output_options()
def ports(session: Session, *, container: str) -> None:
    """List the node's ports that containers hold."""
    session.output.table(session.run(lambda client: client.node.ports(container=container)), _views.PORT)


@click.command()
@click.option("--severity", type=click.Choice(enum_names(DriftSeverity)), multiple=True, help="Only those of this one.")
@container_filter_option
@output_options()
def drift(session: Session, *, severity: tuple[str, ...], container: str) -> None:
    """List what was changed outside gpudock, or does not agree, and what is done about it."""
    comparison = session.run(lambda client: client.node.comparison())
    if comparison.trouble:
        click.echo(f"not up to date: {comparison.trouble}", err=True)
    found = session.run(lambda client: client.node.drift(severities=severity, container=container))
    session.output.table(found, _views.DRIFT)


@click.command()
@click.argument("name", default="")
@output_options()
def node(session: Session, *, name: str) -> None:
    """Show the node: what it has, what is free, and whether its parts answer."""
    session.output.details(session.run(lambda client: client.node.get(name)), _views.NODE)
