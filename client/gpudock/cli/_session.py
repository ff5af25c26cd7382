"""What all commands share: the client they speak through, how they write results, and how they fail."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from gpudock import Busy, Client, GpudockError, Unavailable
from gpudock._channel import read_token
from gpudock.cli._exit_codes import INTERRUPTED, exit_code_of

T = TypeVar("T")
M = TypeVar("M", bound=Message)

# Whoever waits at a terminal wants to know soon that nobody answers; a daemon that restarts is back by then.
_RETRY_FOR = 2.0


@dataclass(frozen=True, slots=True)
class Session:
    """One run of the command."""

    address: str
    token_file: Path | None
    tls: bool
    ca: Path | None
    cert: Path | None
    key: Path | None
    as_json: bool

    def run(self, work: Callable[[Client], Awaitable[T]], *, failure_code: int | None = None) -> T:
        """Do `work` with a client; what it fails with ends the process, with `failure_code` or the error's own."""
        try:
            return asyncio.run(self._with_client(work))
        except GpudockError as error:
            self._fail(error, failure_code)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def show(self, message: M, view: Callable[[M], str]) -> None:
        """Write one message to stdout."""
        click.echo(_json(message_dict(message)) if self.as_json else view(message))

    def show_all(self, messages: Iterable[M], view: Callable[[Iterable[M]], str]) -> None:
        """Write a list of messages to stdout."""
        click.echo(_json([message_dict(message) for message in messages]) if self.as_json else view(messages))

    async def _with_client(self, work: Callable[[Client], Awaitable[T]]) -> T:
        try:
            token = read_token(self.token_file) if self.token_file else ""
            client = Client(
                self.address,
                token=token,
                tls=self.tls,
                ca=self.ca,
                cert=self.cert,
                key=self.key,
                retry_for=_RETRY_FOR,
            )
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from error
        try:
            async with client:
                return await work(client)
        finally:
            # grpc.aio's poller may wake once more for a descriptor that the end of the loop has closed. All is said by
            # now, and a traceback of that is nothing for a terminal.
            asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)

    def _fail(self, error: GpudockError, failure_code: int | None) -> NoReturn:
        # With violations, the message is the same sentences once more.
        said = [str(violation) for violation in error.violations] or [error.message]
        first, *rest = said if len(said) == 1 else (f"{len(said)} fields are not valid", *said)
        click.echo(f"error: {error.reason}: {first}", err=True)
        for line in rest:
            click.echo(f"  {line}", err=True)
        if isinstance(error, Busy) and error.operation_id:
            click.echo(f"wait for it with: gpudock operations watch {error.operation_id}", err=True)
        if isinstance(error, Unavailable) and not error.answered:
            click.echo(f"is gpudockd running at {self.address}? --address says where to look", err=True)
        sys.exit(exit_code_of(error) if failure_code is None else failure_code)


def message_dict(message: Message) -> object:
    """The message as proto3's JSON has it (64-bit numbers are strings), with the contract's own field names."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _json(value: object) -> str:
    return json.dumps(value, indent=2)
