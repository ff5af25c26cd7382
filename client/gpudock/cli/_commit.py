"""`gpudock commit`."""

from __future__ import annotations

import click

from gpudock import Client, CommittedImage, OperationCall
from gpudock.cli import _views
from gpudock.cli._completion import container_argument
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._wait import follow


@click.command()
@container_argument
@click.argument("image", metavar="REPOSITORY[:TAG]")
@click.option("-a", "--author", default="", help="Who made it.")
@click.option("-m", "--message", default="", help="What it is.")
@click.option("-c", "--change", multiple=True, help="A line of a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ...")
@click.option("--no-pause", is_flag=True, help="Let the container run on while its files are read.")
@click.option("--replace", is_flag=True, help="Also replace an image that gpudock did not commit for the owner.")
@click.option("--validate-only", is_flag=True, help="Show what would be done, and do nothing.")
@output_options()
def commit(
    session: Session,
    *,
    name: str,
    image: str,
    author: str,
    message: str,
    change: tuple[str, ...],
    no_pause: bool,
    replace: bool,
    validate_only: bool,
) -> None:
    """Make an image of a container's files as they are now."""
    repository, tag = _split(image)

    def begin(client: Client) -> OperationCall[CommittedImage]:
        return client.containers.commit(
            name,
            repository,
            tag=tag,
            author=author,
            comment=message,
            changes=change,
            pause=not no_pause,
            replace=replace,
            validate_only=validate_only,
        )

    if validate_only:
        session.show_plan(lambda client: begin(client).plan())
        return
    committed = session.run(lambda client: follow(begin(client), name))
    session.output.details(committed, _views.COMMITTED_IMAGE)


def _split(image: str) -> tuple[str, str]:
    """Repository and tag; a colon before a slash is that of a port."""
    repository, colon, tag = image.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (image, "")
