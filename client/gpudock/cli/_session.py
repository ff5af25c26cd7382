"""One run of the command: its connection to the daemon, and how its errors end the process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

import click

from gpudock import Client, GpudockError, OperationPlan
from gpudock._channel import read_token
from gpudock.cli import _operation_views
from gpudock.cli._exit_codes import INTERRUPTED, exit_code_of
from gpudock.cli._next_steps import is_no_answer, next_step
from gpudock.cli._output import Output

T = TypeVar("T")

# A user at a terminal should soon learn that the daemon is down; a daemon that restarts is back within this time.
_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the daemon, as the options before the command say."""

    address: str
    token_file: Path | None = None
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def client(self, *, retry_for: float) -> Client:
        """Return a client that repeats calls for `retry_for` seconds while the daemon is unavailable.

        Raises:
            ValueError: the token would be sent unencrypted, or its file is empty.
            OSError: a file cannot be read.
        """
        return Client(
            self.address,
            token=read_token(self.token_file) if self.token_file else "",
            tls=self.tls,
            ca=self.ca,
            cert=self.cert,
            key=self.key,
            retry_for=retry_for,
        )


async def use(client: Client, work: Callable[[Client], Awaitable[T]]) -> T:
    """Do `work` with `client` and close it."""
    try:
        async with client:
            return await work(client)
    finally:
        # grpc.aio's poller may wake once more for a descriptor that the end of the loop has closed. The result is
        # known by then, and a traceback of that would only confuse.
        asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)


@dataclass(frozen=True, slots=True)
class Session:
    """One run of the command."""

    connection: Connection
    output: Output = field(default_factory=Output)

    def run(self, work: Callable[[Client], Awaitable[T]], *, failure_code: int | None = None) -> T:
        """Do `work` with a client; an error ends the process with `failure_code`, or with the code of the error."""
        try:
            return asyncio.run(self._with_client(work))
        except GpudockError as error:
            self._fail(error, failure_code)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def show_plan(self, plan: Callable[[Client], Awaitable[OperationPlan]]) -> None:
        """Print the plan of an operation; -q is refused before anything is sent, since a plan has no name."""
        if self.output.names_only:
            raise click.UsageError("-q cannot be combined with --validate-only: a plan has no name")
        self.output.details(self.run(plan), _operation_views.PLAN)

    async def _with_client(self, work: Callable[[Client], Awaitable[T]]) -> T:
        try:
            client = self.connection.client(retry_for=_RETRY_SECONDS)
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from error
        return await use(client, work)

    def _fail(self, error: GpudockError, failure_code: int | None) -> NoReturn:
        # The message of an error with violations consists of their sentences.
        sentences = [str(violation) for violation in error.violations] or [self._sentence(error)]
        first, *rest = sentences if len(sentences) == 1 else (f"{len(sentences)} fields are not valid", *sentences)
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error.reason}: {first}", err=True)
        for line in rest:
            click.echo(f"  {line}", err=True)
        step = next_step(error)
        if step:
            click.echo(step, err=True)
        sys.exit(exit_code_of(error) if failure_code is None else failure_code)

    def _sentence(self, error: GpudockError) -> str:
        if not is_no_answer(error):
            return error.message
        # gRPC names every address and layer before the cause.
        return f"gpudockd does not answer at {self.connection.address}: {error.message.rpartition('error: ')[2]}"
