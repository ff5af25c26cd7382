"""`gpudock scale`."""

from __future__ import annotations

import click

from gpudock import Client, Container, OperationCall
from gpudock._enums import words_of
from gpudock.cli import _operation_views, _views
from gpudock.cli._arguments import Decimal, Size
from gpudock.cli._follow import follow
from gpudock.cli._gpu_options import gpu_options, gpu_request_of
from gpudock.cli._session import Session
from gpudock.cli._snapshot_options import snapshots_option
from gpudock.v1.container_service_pb2 import ScaleStrategy


@click.command()
@click.argument("name")
@gpu_options
@click.option("--cpus", type=Decimal(), help="How many CPUs' worth of time; 0 for no limit.")
@click.option("--memory", type=Size(), help="How much memory, such as 8G; 0 for no limit.")
@click.option("--shm-size", type=Size(), help="The size of /dev/shm; 0 for the engine's default.")
@click.option(
    "--strategy",
    type=click.Choice(words_of(ScaleStrategy)),
    default="auto",
    show_default=True,
    help="In place if that can be, in place or not at all, or by a new process.",
)
@snapshots_option
@click.option("--validate-only", is_flag=True, help="Show what would be done, and do nothing.")
@click.pass_obj
def scale(
    session: Session,
    *,
    name: str,
    gpus: int | None,
    gpu: tuple[str, ...],
    gpu_model: str,
    gpu_memory: int,
    cpus: float | None,
    memory: int | None,
    shm_size: int | None,
    strategy: str,
    snapshots: str | None,
    validate_only: bool,
) -> None:
    """Change the GPUs, CPUs, memory or /dev/shm of a container to these values; its files stay."""
    request = gpu_request_of(gpus, gpu, gpu_model, gpu_memory)
    if request is None and cpus is None and memory is None and shm_size is None:
        raise click.UsageError("nothing to change: give --gpus, --gpu, --cpus, --memory or --shm-size")

    def begin(client: Client) -> OperationCall[Container]:
        return client.containers.scale(
            name,
            gpus=request,
            cpus=cpus,
            memory_bytes=memory,
            shm_size_bytes=shm_size,
            strategy=strategy,
            snapshots=snapshots,
            validate_only=validate_only,
        )

    if validate_only:
        session.show(session.run(lambda client: begin(client).plan()), _operation_views.plan)
        return
    session.show(session.run(lambda client: follow(begin(client), name)), _views.one_container)
