"""The options that select the GPUs of a container."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import click
import grpc

from gpudock import Client, Exhausted, Gpu
from gpudock.cli._arguments import ALL_GPUS, GpuCount, Size
from gpudock.cli._completion import complete_gpus
from gpudock.v1.container_pb2 import GpuRequest

F = TypeVar("F", bound=Callable[..., Any])


class GpuFlags(TypedDict):
    """The parsed options; None and () mean that an option is not given."""

    gpus: int | None
    gpu: tuple[str, ...]
    gpu_model: str | None
    gpu_memory: int | None


def gpu_options(command: F) -> F:
    """Add --gpus, --gpu, --gpu-model and --gpu-memory, for `gpu_choice`."""
    options = (
        click.option("--gpus", type=GpuCount(), help="Set the number of GPUs; 0 for none, all for every free one."),
        click.option(
            "--gpu", multiple=True, metavar="UUID", shell_complete=complete_gpus, help="Use this GPU. Can be repeated."
        ),
        click.option("--gpu-model", metavar="TEXT", help="With --gpus: use only GPUs with this text in their name."),
        click.option("--gpu-memory", type=Size(), help="With --gpus: use only GPUs with at least this much memory."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """The GPUs that the options ask for. None as `model` or `memory` keeps what the container has."""

    count: int = 0
    uuids: tuple[str, ...] = ()
    model: str | None = None
    memory: int | None = None

    async def request(self, client: Client, name: str = "", present: GpuRequest | None = None) -> GpuRequest:
        """Return the request for the container `name`, whose spec has the request `present`.

        A number without --gpu-model and --gpu-memory keeps the kind of GPUs. `all` means every matching GPU that is
        free or that the container holds.

        Raises:
            Exhausted: no GPU matches `all`.
        """
        if self.uuids:
            return GpuRequest(uuids=self.uuids)
        present = present or GpuRequest()
        asked = GpuRequest(
            count=max(self.count, 0),
            model=present.model if self.model is None else self.model,
            min_memory_bytes=present.min_memory_bytes if self.memory is None else self.memory,
        )
        if self.count == ALL_GPUS:
            asked.count = _matching(await client.node.gpus(), name, asked)
            click.echo(f"--gpus all: {asked.count}", err=True)
        return asked


async def resolve_gpus(client: Client, name: str, choice: GpuChoice | None) -> tuple[GpuRequest | None, str]:
    """Return the request for a change of the container `name` and the etag it is based on; None for no change."""
    if choice is None:
        return None, ""
    container = await client.containers.get(name)
    return await choice.request(client, name, container.spec.gpus), container.etag


def _matching(gpus: Iterable[Gpu], name: str, asked: GpuRequest) -> int:
    count = sum(
        gpu.schedulable
        and gpu.container in {"", name}
        and asked.model.lower() in gpu.name.lower()
        and gpu.memory_total_bytes >= asked.min_memory_bytes
        for gpu in gpus
    )
    if not count:
        raise Exhausted(
            "--gpus all: no matching GPU is free; `gpudock gpus` lists all GPUs",
            code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        )
    return count


def gpu_choice(flags: GpuFlags) -> GpuChoice | None:
    """Return the GPUs that the options ask for; None if no option is given."""
    gpus, gpu, model, memory = flags["gpus"], flags["gpu"], flags["gpu_model"], flags["gpu_memory"]
    narrowed = model is not None or memory is not None
    if gpu and (gpus is not None or narrowed):
        raise click.UsageError(
            "--gpu selects GPUs by UUID; it cannot be combined with --gpus, --gpu-model or --gpu-memory"
        )
    if gpu:
        return GpuChoice(uuids=gpu)
    if gpus is None:
        if narrowed:
            raise click.UsageError("--gpu-model and --gpu-memory need --gpus, the number of GPUs")
        return None
    return GpuChoice(count=gpus, model=model, memory=memory)
