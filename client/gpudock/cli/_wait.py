"""Waiting for an operation to end, and advice for a user who interrupts the wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import click

from gpudock import OperationCall
from gpudock.cli._progress import progress

T = TypeVar("T")


async def follow(call: OperationCall[T], container: str = "") -> T:
    """Show the progress of an operation until it has ended, and return its result."""
    try:
        with progress() as shown:
            async for snapshot in call:
                shown.show(snapshot)
        return await call
    except asyncio.CancelledError:
        _print_how_to_watch(call.operation_id, container)
        raise


async def wait_for(response: Awaitable[T], container: str) -> T:
    """Return the response to a change that reports no progress."""
    try:
        return await response
    except asyncio.CancelledError:
        _print_how_to_watch("", container)
        raise


def _print_how_to_watch(operation_id: str, container: str) -> None:
    if operation_id:
        click.echo(f"interrupted; operation {operation_id} continues", err=True)
        click.echo(f"  watch it:  gpudock operations watch {operation_id}", err=True)
        click.echo(f"  cancel it: gpudock operations cancel {operation_id}", err=True)
    else:
        click.echo("interrupted before the server answered; an operation that has begun continues", err=True)
        click.echo(f"  list it: gpudock operations list --container {container}", err=True)
