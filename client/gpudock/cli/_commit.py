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
@click.option("-a", "--author", default="", help="Set the author of the image.")
@click.option("-m", "--message", default="", help="Set the commit message.")
@click.option(
    "-c", "--change", multiple=True, help="Apply a Dockerfile instruction: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ..."
)
@click.option("--no-pause", is_flag=True, help="Do not pause the container while its files are read.")
@click.option(
    "--replace",
    is_flag=True,
    help="Replace an image of that name even if gpudock did not commit it for the same owner.",
)
@click.option("--validate-only", is_flag=True, help="Print the plan and change nothing.")
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
    """Create an image from the files of a container."""
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
    """Return repository and tag. A colon before a slash belongs to a port, not to a tag."""
    repository, colon, tag = image.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (image, "")
