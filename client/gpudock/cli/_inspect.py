"""The commands that only look."""

from __future__ import annotations

from dataclasses import replace

import click

from gpudock import ContainerState, DriftSeverity
from gpudock._enums import enum_names
from gpudock.cli import _views
from gpudock.cli._arguments import LabelFilter
from gpudock.cli._session import Session


@click.command()
@click.argument("name")
@click.pass_obj
def get(session: Session, *, name: str) -> None:
    """Show one container."""
    session.show(session.run(lambda client: client.containers.get(name)), _views.container)


@click.command()
@click.argument("name")
@click.pass_obj
def inspect(session: Session, *, name: str) -> None:
    """Show one container as JSON."""
    container = session.run(lambda client: client.containers.get(name))
    replace(session, as_json=True).show(container, _views.container)


@click.command("list")
@click.option("--state", type=click.Choice(enum_names(ContainerState)), multiple=True, help="Only those in this state.")
@click.option("--label", type=LabelFilter(), multiple=True, help="Only those with this label.")
@click.option("--owner", default="", help="Only those of this owner.")
@click.option("--node", default="", help="Only those on this node.")
@click.pass_obj
def list_containers(
    session: Session, *, state: tuple[str, ...], label: tuple[tuple[str, str], ...], owner: str, node: str
) -> None:
    """List containers."""
    found = session.run(lambda client: client.containers.list(states=state, labels=dict(label), owner=owner, node=node))
    session.show_all(found, _views.containers)


@click.command()
@click.option("--free", "claimed", flag_value=False, type=bool, default=None, help="Only those that nobody holds.")
@click.option("--held", "claimed", flag_value=True, type=bool, help="Only those that a container holds.")
@click.option("--model", default="", help="Only those with this in their name.")
@click.option("--container", default="", help="Only those that this container holds.")
@click.pass_obj
def gpus(session: Session, *, claimed: bool | None, model: str, container: str) -> None:
    """List the node's GPUs, and who holds them."""
    found = session.run(lambda client: client.node.gpus(claimed=claimed, model=model, container=container))
    session.show_all(found, _views.gpus)


@click.command()
@click.option("--container", default="", help="Only those that this container holds.")
@click.pass_obj
def ports(session: Session, *, container: str) -> None:
    """List the node's ports that containers hold."""
    session.show_all(session.run(lambda client: client.node.ports(container=container)), _views.ports)


@click.command()
@click.option("--severity", type=click.Choice(enum_names(DriftSeverity)), multiple=True, help="Only those of this one.")
@click.option("--container", default="", help="Only what is about this container.")
@click.pass_obj
def drift(session: Session, *, severity: tuple[str, ...], container: str) -> None:
    """List what was changed outside gpudock, or does not agree, and what is done about it."""
    comparison = session.run(lambda client: client.node.comparison())
    if comparison.trouble:
        click.echo(f"not up to date: {comparison.trouble}", err=True)
    found = session.run(lambda client: client.node.drift(severities=severity, container=container))
    session.show_all(found, _views.drift)


@click.command()
@click.argument("name", default="")
@click.pass_obj
def node(session: Session, *, name: str) -> None:
    """Show the node: what it has, what is free, and whether its parts answer."""
    session.show(session.run(lambda client: client.node.get(name)), _views.node)
