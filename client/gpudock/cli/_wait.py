"""Waiting for the server's work, and what is said when the user does not want to wait."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import TypeVar

import click

from gpudock import OperationCall
from gpudock.cli._progress import Progress, drawn

T = TypeVar("T")


async def follow(call: OperationCall[T], container: str = "") -> T:
    """Show an operation's progress until it has ended; returns its result."""
    try:
        async with drawn(Progress(sys.stderr, live=sys.stderr.isatty())) as progress:
            async for snapshot in call:
                progress.show(snapshot)
        return await call
    except asyncio.CancelledError:
        _print_how_to_watch(call.operation_id, container)
        raise


async def wait_for(answer: Awaitable[T], container: str) -> T:
    """The answer to a change without progress of its own."""
    try:
        return await answer
    except asyncio.CancelledError:
        _print_how_to_watch("", container)
        raise


def _print_how_to_watch(operation_id: str, container: str) -> None:
    if operation_id:
        click.echo(f"interrupted; operation {operation_id} goes on", err=True)
        click.echo(f"  watch it:  gpudock operations watch {operation_id}", err=True)
        click.echo(f"  cancel it: gpudock operations cancel {operation_id}", err=True)
    else:
        click.echo("interrupted before the server had answered; if it has begun, it goes on", err=True)
        click.echo(f"  look for it: gpudock operations list --container {container}", err=True)
