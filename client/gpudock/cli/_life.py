"""The commands that start, stop and end containers."""

from __future__ import annotations

from datetime import timedelta

import click

from gpudock import Client, Container, OperationCall
from gpudock.cli import _operation_views, _views
from gpudock.cli._arguments import Span
from gpudock.cli._follow import follow, settled
from gpudock.cli._gpu_options import gpu_options, gpu_request_of
from gpudock.cli._session import Session
from gpudock.cli._snapshot_options import snapshots_option

_GRACE = "How long the process has from the stop signal to SIGKILL."


@click.command()
@click.argument("name")
@gpu_options
@snapshots_option
@click.option("--validate-only", is_flag=True, help="Show what would be done, and do nothing.")
@click.pass_obj
def start(
    session: Session,
    *,
    name: str,
    gpus: int | None,
    gpu: tuple[str, ...],
    gpu_model: str,
    gpu_memory: int,
    snapshots: str | None,
    validate_only: bool,
) -> None:
    """Start a stopped container, if need be with other GPUs than before."""
    request = gpu_request_of(gpus, gpu, gpu_model, gpu_memory)

    def begin(client: Client) -> OperationCall[Container]:
        return client.containers.start(name, gpus=request, snapshots=snapshots, validate_only=validate_only)

    if validate_only:
        session.show(session.run(lambda client: begin(client).plan()), _operation_views.plan)
        return
    started = session.run(lambda client: follow(begin(client), name))
    session.show(started, _views.one_container)


@click.command()
@click.argument("name")
@click.option("--keep-resources", is_flag=True, help="Keep its GPUs and ports while it is stopped.")
@click.option("--timeout", type=Span(), help=_GRACE)
@click.pass_obj
def stop(session: Session, *, name: str, keep_resources: bool, timeout: timedelta | None) -> None:
    """Stop a container; its GPUs and ports are free then, its files stay."""
    stopped = session.run(
        lambda client: settled(client.containers.stop(name, keep_resources=keep_resources, timeout=timeout), name)
    )
    session.show(stopped, _views.one_container)


@click.command()
@click.argument("name")
@click.option("--timeout", type=Span(), help=_GRACE)
@snapshots_option
@click.pass_obj
def restart(session: Session, *, name: str, timeout: timedelta | None, snapshots: str | None) -> None:
    """Stop a container and start it, with the GPUs and ports that it has."""
    restarted = session.run(
        lambda client: follow(client.containers.restart(name, timeout=timeout, snapshots=snapshots), name)
    )
    session.show(restarted, _views.one_container)


@click.command()
@click.argument("name")
@click.pass_obj
def pause(session: Session, *, name: str) -> None:
    """Freeze every process of a container."""
    paused = session.run(lambda client: settled(client.containers.pause(name), name))
    session.show(paused, _views.one_container)


@click.command()
@click.argument("name")
@click.pass_obj
def unpause(session: Session, *, name: str) -> None:
    """Thaw every process of a paused container."""
    thawed = session.run(lambda client: settled(client.containers.unpause(name), name))
    session.show(thawed, _views.one_container)


@click.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Also one that runs.")
@click.pass_obj
def delete(session: Session, *, name: str, force: bool) -> None:
    """Delete a container with its files; its GPUs and ports are free then."""
    session.run(lambda client: settled(client.containers.delete(name, force=force), name))
