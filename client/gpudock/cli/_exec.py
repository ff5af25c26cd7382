"""`gpudock exec`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import click

from gpudock import Client, ExecSession
from gpudock._exec import ExecOptions
from gpudock.cli._arguments import TimeSpan, Variable
from gpudock.cli._completion import container_argument
from gpudock.cli._exit_codes import EXEC_FAILED
from gpudock.cli._session import Session
from gpudock.cli._terminal import StdinPump, raw_mode, terminal_size, write_all

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_STDIN, _STDOUT, _STDERR = 0, 1, 2


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Keep stdin open and send it to the command.")
@click.option("-t", "--tty", is_flag=True, help="Allocate a terminal.")
@click.option("-e", "--env", type=Variable(), multiple=True, help="Set an environment variable.")
@click.option("-w", "--workdir", default="", help="Set the working directory.")
@click.option("-u", "--user", default="", help="Set the user: NAME or UID, optionally with :GROUP.")
@click.option("--timeout", type=TimeSpan(), help="Kill the command after this time.")
@container_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def exec_command(
    session: Session,
    *,
    interactive: bool,
    tty: bool,
    env: tuple[tuple[str, str], ...],
    workdir: str,
    user: str,
    timeout: timedelta | None,
    name: str,
    command: tuple[str, ...],
) -> None:
    """Run a command in a running container.

    Example: gpudock exec train -- nvidia-smi -L. Signals are forwarded to the command, and its exit code is returned.
    """
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("COMMAND is missing: give the command to run after `--`")
    options = ExecOptions(env=dict(env), working_dir=workdir, user=user, tty=tty, stdin=interactive)
    if timeout is not None:
        options["timeout"] = timeout
    if tty:
        _add_terminal_options(options)
    sys.exit(session.run(lambda client: _run(client, name, command, options), failure_code=EXEC_FAILED))


def _add_terminal_options(options: ExecOptions) -> None:
    size = terminal_size()
    if size is not None:
        options["size"] = size
    term = os.environ.get("TERM")
    if term:
        options["env"] = {"TERM": term, **options["env"]}


async def _run(client: Client, name: str, command: tuple[str, ...], options: ExecOptions) -> int:
    raw = options["tty"] and options["stdin"] and os.isatty(_STDIN)
    async with (
        client.containers.exec(name, command, **options) as running,
        _forward_signals(running, tty=options["tty"]),
    ):
        with raw_mode(_STDIN) if raw else contextlib.nullcontext():
            if options["stdin"]:
                StdinPump(_STDIN, running, asyncio.get_running_loop()).start()
            async for stream, data in running.output():
                # In a thread: a slow reader of the output must not block signals and input.
                await asyncio.to_thread(write_all, _STDOUT if stream == "stdout" else _STDERR, data)
        exited = await running.exit()
    if exited.timed_out:
        click.echo("the command was killed: --timeout expired", err=True)
    if exited.message:
        click.echo(exited.message, err=True)
    return exited.returncode


@asynccontextmanager
async def _forward_signals(running: ExecSession, *, tty: bool) -> AsyncIterator[None]:
    """Forward signals and changes of the terminal size, in order."""
    loop = asyncio.get_running_loop()
    pending: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
    for number in _FORWARDED:
        loop.add_signal_handler(number, pending.put_nowait, partial(running.signal, number.name))
    if tty:
        loop.add_signal_handler(signal.SIGWINCH, pending.put_nowait, partial(_resize, running))
    sender = asyncio.create_task(_send_pending(pending))
    try:
        yield
    finally:
        sender.cancel()
        for number in (*_FORWARDED, signal.SIGWINCH):
            loop.remove_signal_handler(number)


async def _send_pending(pending: asyncio.Queue[Callable[[], Awaitable[None]]]) -> None:
    with contextlib.suppress(BrokenPipeError):
        while True:
            await (await pending.get())()


async def _resize(running: ExecSession) -> None:
    size = terminal_size()
    if size is not None:
        await running.resize(*size)
