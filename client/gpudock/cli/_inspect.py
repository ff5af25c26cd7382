"""The commands that read the state of containers and of the node."""

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
    """Show a container."""
    session.output.details(session.run(lambda client: client.containers.get(name)), _views.CONTAINER)


@click.command()
@container_argument
@output_options(default=JSON)
def inspect(session: Session, *, name: str) -> None:
    """Show a container as JSON."""
    session.output.details(session.run(lambda client: client.containers.get(name)), _views.CONTAINER)


@click.command("list")
@click.option(
    "--state", type=click.Choice(enum_names(ContainerState)), multiple=True, help="Show only containers in this state."
)
@click.option("--label", type=LabelFilter(), multiple=True, help="Show only containers with this label.")
@click.option("--owner", default="", help="Show only containers of this owner.")
@click.option("--node", default="", help="Show only containers on this node.")
@output_options()
def list_containers(
    session: Session, *, state: tuple[str, ...], label: tuple[tuple[str, str], ...], owner: str, node: str
) -> None:
    """List containers."""
    found = session.run(lambda client: client.containers.list(states=state, labels=dict(label), owner=owner, node=node))
    session.output.table(found, _views.CONTAINER)


@click.command()
@click.option(
    "--free", "claimed", flag_value=False, type=bool, default=None, help="Show only GPUs that no container holds."
)
@click.option("--held", "claimed", flag_value=True, type=bool, help="Show only GPUs that a container holds.")
@click.option("--model", default="", help="Show only GPUs with this text in their name.")
@container_filter_option
@output_options()
def gpus(session: Session, *, claimed: bool | None, model: str, container: str) -> None:
    """List the GPUs of the node and the containers that hold them."""
    found = session.run(lambda client: client.node.gpus(claimed=claimed, model=model, container=container))
    session.output.table(found, _views.GPU)


@click.command()
@container_filter_option
@output_options()
def ports(session: Session, *, container: str) -> None:
    """List the host ports that containers hold."""
    session.output.table(session.run(lambda client: client.node.ports(container=container)), _views.PORT)


@click.command()
@click.option(
    "--severity",
    type=click.Choice(enum_names(DriftSeverity)),
    multiple=True,
    help="Show only findings of this severity.",
)
@container_filter_option
@output_options()
def drift(session: Session, *, severity: tuple[str, ...], container: str) -> None:
    """List differences between the records and the engine, and what is done about them."""
    comparison = session.run(lambda client: client.node.comparison())
    if comparison.trouble:
        click.echo(f"the list is not up to date: {comparison.trouble}", err=True)
    found = session.run(lambda client: client.node.drift(severities=severity, container=container))
    session.output.table(found, _views.DRIFT)


@click.command()
@click.argument("name", default="")
@output_options()
def node(session: Session, *, name: str) -> None:
    """Show the node: its capacity, what is free, and the health of its components."""
    session.output.details(session.run(lambda client: client.node.get(name)), _views.NODE)
