"""The commands that start, stop, pause and delete containers."""

from __future__ import annotations

import signal as signals
from datetime import timedelta
from typing import Unpack

import click

from gpudock import Client, Container, OperationCall
from gpudock.cli import _views
from gpudock.cli._arguments import TimeSpan
from gpudock.cli._completion import container_argument
from gpudock.cli._confirm_change import change, validate_only_option
from gpudock.cli._gpu_options import GpuFlags, gpu_choice, gpu_options, resolve_gpus
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._snapshot_options import snapshots_option
from gpudock.cli._wait import follow, wait_for

_TIMEOUT_HELP = "Wait this long after the stop signal before SIGKILL."
_KILL = ("KILL", "SIGKILL", str(int(signals.SIGKILL)))


class _StartFlags(GpuFlags):
    """The parsed options of `start`."""

    name: str
    snapshots: str | None
    validate_only: bool


@click.command()
@container_argument
@gpu_options
@snapshots_option
@validate_only_option
@output_options()
def start(session: Session, **flags: Unpack[_StartFlags]) -> None:
    """Start a stopped container, optionally with other GPUs."""
    choice = gpu_choice(flags)
    gpus, etag = session.run(lambda client: resolve_gpus(client, flags["name"], choice))

    def begin(client: Client, *, validate_only: bool, etag: str) -> OperationCall[Container]:
        return client.containers.start(
            flags["name"], gpus=gpus, snapshots=flags["snapshots"], validate_only=validate_only, etag=etag
        )

    # A start ends no process, so there is nothing to confirm.
    change(session, flags["name"], begin, etag=etag, validate_only=flags["validate_only"], yes=True)


@click.command()
@container_argument
@click.option("--keep-resources", is_flag=True, help="Keep the GPUs and ports of the container while it is stopped.")
@click.option("-t", "--timeout", type=TimeSpan(), help=_TIMEOUT_HELP)
@output_options()
def stop(session: Session, *, name: str, keep_resources: bool, timeout: timedelta | None) -> None:
    """Stop a container and release its GPUs and ports; its files are kept."""
    stopped = session.run(
        lambda client: wait_for(client.containers.stop(name, keep_resources=keep_resources, timeout=timeout), name)
    )
    session.output.row(stopped, _views.CONTAINER)


@click.command()
@container_argument
@click.option("--keep-resources", is_flag=True, help="Keep the GPUs and ports of the container while it is stopped.")
@click.option("-s", "--signal", default="KILL", show_default=True, help="Send this signal; only KILL is supported.")
@output_options()
def kill(session: Session, *, name: str, keep_resources: bool, signal: str) -> None:
    """Kill a container with SIGKILL and release its GPUs and ports; its files are kept.

    To send another signal to the main process: gpudock exec CONTAINER -- kill -s HUP 1
    """
    if signal.upper() not in _KILL:
        raise click.UsageError(
            f"gpudock kill sends SIGKILL only, not {signal}; for the main process use: gpudock exec {name} -- kill -s"
            f" {signal.upper().removeprefix('SIG')} 1"
        )
    killed = session.run(
        lambda client: wait_for(client.containers.stop(name, keep_resources=keep_resources, timeout=0), name)
    )
    session.output.row(killed, _views.CONTAINER)


@click.command()
@container_argument
@click.option("-t", "--timeout", type=TimeSpan(), help=_TIMEOUT_HELP)
@snapshots_option
@output_options()
def restart(session: Session, *, name: str, timeout: timedelta | None, snapshots: str | None) -> None:
    """Restart a container with the same GPUs and ports."""
    restarted = session.run(
        lambda client: follow(client.containers.restart(name, timeout=timeout, snapshots=snapshots), name)
    )
    session.output.row(restarted, _views.CONTAINER)


@click.command()
@container_argument
@output_options()
def pause(session: Session, *, name: str) -> None:
    """Pause all processes of a container."""
    paused = session.run(lambda client: wait_for(client.containers.pause(name), name))
    session.output.row(paused, _views.CONTAINER)


@click.command()
@container_argument
@output_options()
def unpause(session: Session, *, name: str) -> None:
    """Unpause all processes of a container."""
    thawed = session.run(lambda client: wait_for(client.containers.unpause(name), name))
    session.output.row(thawed, _views.CONTAINER)


@click.command()
@container_argument
@click.option("-f", "--force", is_flag=True, help="Delete even if it is running.")
@click.pass_obj
def delete(session: Session, *, name: str, force: bool) -> None:
    """Delete a container and its files, and release its GPUs and ports."""
    session.run(lambda client: wait_for(client.containers.delete(name, force=force), name))
