"""`gpudock create`."""

from __future__ import annotations

from typing import Unpack

import click

from gpudock import Client, Container, ContainerSpec, OperationCall
from gpudock._enums import words_of
from gpudock.cli import _operation_views, _views
from gpudock.cli._follow import follow
from gpudock.cli._session import Session
from gpudock.cli._spec_options import SpecFlags, spec_of_flags, spec_options
from gpudock.v1.container_service_pb2 import PullPolicy


class _Flags(SpecFlags):
    """The options as click hands them over."""

    name: str
    image: str
    owner: str
    pull: str
    create_only: bool
    validate_only: bool


@click.command()
@click.argument("name")
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@spec_options
@click.option("--owner", default="", help="Who it belongs to, for lists to filter by.")
@click.option(
    "--pull",
    type=click.Choice(words_of(PullPolicy)),
    default="missing",
    show_default=True,
    help="Whether the image is pulled first.",
)
@click.option("--create-only", is_flag=True, help="Do not start it.")
@click.option("--validate-only", is_flag=True, help="Show what would be done, and do nothing.")
@click.pass_obj
def create(session: Session, **flags: Unpack[_Flags]) -> None:
    """Create a container NAME from IMAGE and start it.

    COMMAND stands after `--`: gpudock create train pytorch/pytorch --gpus 2 -- python train.py --epochs 3
    """
    spec, _ = spec_of_flags(flags)
    spec.image = flags["image"]
    if flags["validate_only"]:
        plan = session.run(lambda client: _begin(client, flags, spec).plan())
        session.show(plan, _operation_views.plan)
        return
    made = session.run(lambda client: follow(_begin(client, flags, spec), flags["name"]))
    session.show(made, _views.one_container)


def _begin(client: Client, flags: _Flags, spec: ContainerSpec) -> OperationCall[Container]:
    return client.containers.create(
        flags["name"],
        spec,
        owner=flags["owner"],
        pull=flags["pull"],
        create_only=flags["create_only"],
        validate_only=flags["validate_only"],
    )
