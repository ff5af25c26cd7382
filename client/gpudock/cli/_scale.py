"""`gpudock scale`."""

from __future__ import annotations

from typing import Unpack

import click

from gpudock import Client, Container, OperationCall
from gpudock._enums import enum_names
from gpudock.cli._arguments import Decimal, Size
from gpudock.cli._completion import container_argument
from gpudock.cli._confirm_change import change, validate_only_option, yes_option
from gpudock.cli._gpu_options import GpuFlags, gpu_choice, gpu_options, resolve_gpus
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._snapshot_options import snapshots_option
from gpudock.v1.container_service_pb2 import ScaleStrategy


class _Flags(GpuFlags):
    """The parsed options."""

    name: str
    cpus: float | None
    memory: int | None
    shm_size: int | None
    strategy: str
    snapshots: str | None
    validate_only: bool
    yes: bool


@click.command()
@container_argument
@gpu_options
@click.option("--cpus", type=Decimal(), help="Set the CPU limit, such as 1.5; 0 for no limit.")
@click.option("-m", "--memory", type=Size(), help="Set the memory limit, such as 8g; 0 for no limit.")
@click.option("--shm-size", type=Size(), help="Set the size of /dev/shm; 0 for the default of the engine.")
@click.option(
    "--strategy",
    type=click.Choice(enum_names(ScaleStrategy)),
    default="auto",
    show_default=True,
    help="auto: in place if possible. live: in place or fail. recreate: with a new process.",
)
@snapshots_option
@validate_only_option
@yes_option
@output_options()
def scale(session: Session, **flags: Unpack[_Flags]) -> None:
    """Set the GPUs, CPUs, memory or /dev/shm of a container; its files are kept."""
    choice = gpu_choice(flags)
    if choice is None and flags["cpus"] is None and flags["memory"] is None and flags["shm_size"] is None:
        raise click.UsageError("nothing to change: give --gpus, --gpu, --cpus, --memory or --shm-size")
    gpus, etag = session.run(lambda client: resolve_gpus(client, flags["name"], choice))

    def begin(client: Client, *, validate_only: bool, etag: str) -> OperationCall[Container]:
        return client.containers.scale(
            flags["name"],
            gpus=gpus,
            cpus=flags["cpus"],
            memory_bytes=flags["memory"],
            shm_size_bytes=flags["shm_size"],
            strategy=flags["strategy"],
            snapshots=flags["snapshots"],
            validate_only=validate_only,
            etag=etag,
        )

    change(session, flags["name"], begin, etag=etag, validate_only=flags["validate_only"], yes=flags["yes"])
