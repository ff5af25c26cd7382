"""The options that say which GPUs a container is to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from gpudock.cli._arguments import Size, Whole
from gpudock.v1.container_pb2 import GpuRequest

F = TypeVar("F", bound=Callable[..., Any])


def gpu_options(command: F) -> F:
    """Add --gpus, --gpu, --gpu-model and --gpu-memory, for `gpu_request_of`."""
    options = (
        click.option("--gpus", type=Whole(), help="How many cards; 0 for none."),
        click.option("--gpu", multiple=True, metavar="UUID", help="This card. Can be repeated."),
        click.option("--gpu-model", default="", metavar="TEXT", help="With --gpus: cards with this in their name."),
        click.option("--gpu-memory", type=Size(), default=0, help="With --gpus: cards with at least this memory."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def gpu_request_of(gpus: int | None, gpu: tuple[str, ...], gpu_model: str, gpu_memory: int) -> GpuRequest | None:
    """What these options ask for; None if none was given."""
    if gpu and (gpus is not None or gpu_model or gpu_memory):
        raise click.UsageError("--gpu names the cards; --gpus, --gpu-model and --gpu-memory then do not apply")
    if gpu:
        return GpuRequest(uuids=gpu)
    if gpus is None:
        if gpu_model or gpu_memory:
            raise click.UsageError("--gpu-model and --gpu-memory need --gpus, the number of cards")
        return None
    return GpuRequest(count=gpus, model=gpu_model, min_memory_bytes=gpu_memory)
