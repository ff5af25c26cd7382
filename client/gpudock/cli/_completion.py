"""Shell completion of the names that the daemon has, and `gpudock completion`.

The shell waits for the proposals, and a message would spoil its command line. So there is one attempt with a short
deadline, and a daemon that does not answer means no proposals.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import click
from click.shell_completion import CompletionItem, get_completion_class

from gpudock import Client, ContainerState, GpudockError, OperationKind, VolumeState
from gpudock._enums import enum_name
from gpudock.cli._session import Connection, use

TIMEOUT_VARIABLE = "GPUDOCK_COMPLETION_TIMEOUT"
_DEFAULT_TIMEOUT_SECONDS = 1.0
_MOST_OPERATIONS = 50

# Names with a short description, which zsh and fish show.
_Proposals: TypeAlias = AsyncIterator[tuple[str, str]]
_Complete: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]


def connection_of(context: click.Context) -> Connection:
    """Return the connection that the options before the command describe."""
    given = context.find_root().params
    names = ("address", "token_file", "tls", "ca", "cert", "key")
    return Connection(**{name: given[name] for name in names if given.get(name) is not None})


def _completing(proposals: Callable[[Client, click.Context], _Proposals]) -> _Complete:
    """Return click's callback for an argument or an option whose values are these proposals."""

    def complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        async def collected(client: Client) -> list[CompletionItem[str]]:
            found = proposals(client, context)
            return [CompletionItem(name, help=note) async for name, note in found if name.startswith(incomplete)]

        async def attempt() -> list[CompletionItem[str]]:
            async with asyncio.timeout(float(os.environ.get(TIMEOUT_VARIABLE) or _DEFAULT_TIMEOUT_SECONDS)):
                return await use(connection_of(context).client(retry_for=0.0), collected)

        try:
            return asyncio.run(attempt())
        except (GpudockError, OSError, ValueError):  # TimeoutError is an OSError
            return []

    return complete


async def _containers(client: Client, _: click.Context) -> _Proposals:
    async for one in client.containers.list():
        yield one.name, enum_name(ContainerState, one.status.state)


async def _volumes(client: Client, _: click.Context) -> _Proposals:
    async for one in client.volumes.list():
        yield one.name, enum_name(VolumeState, one.state)


async def _volume_sources(client: Client, context: click.Context) -> _Proposals:
    async for name, note in _volumes(client, context):
        yield f"{name}:", note


async def _revisions(client: Client, context: click.Context) -> _Proposals:
    # click leaves the arguments unparsed while the last word is an option that still lacks its value.
    container = context.params.get("source") or context.params.get("name") or next(iter(context.args), "")
    async for one in client.containers.revisions(container):
        yield str(one.revision), one.spec.image


async def _operations(client: Client, _: click.Context) -> _Proposals:
    left = _MOST_OPERATIONS
    async for one in client.operations.list():
        yield one.id, f"{enum_name(OperationKind, one.kind)} {one.target.name}"
        left -= 1
        if not left:
            return


async def _gpus(client: Client, _: click.Context) -> _Proposals:
    async for one in client.node.gpus():
        yield one.uuid, f"held by {one.container}" if one.container else one.name


complete_containers = _completing(_containers)
complete_volumes = _completing(_volumes)
complete_volume_sources = _completing(_volume_sources)
complete_revisions = _completing(_revisions)
complete_operations = _completing(_operations)
complete_gpus = _completing(_gpus)

container_argument = click.argument("name", metavar="CONTAINER", shell_complete=complete_containers)
volume_argument = click.argument("name", metavar="VOLUME", shell_complete=complete_volumes)
operation_argument = click.argument("operation_id", metavar="ID", shell_complete=complete_operations)
container_filter_option = click.option(
    "--container", default="", shell_complete=complete_containers, help="Show only what belongs to this container."
)


_COMPLETION_HELP = """\b
To turn it on:
  bash: echo 'eval "$(gpudock completion bash)"' >> ~/.bashrc
  zsh:  echo 'eval "$(gpudock completion zsh)"' >> ~/.zshrc
  fish: gpudock completion fish > ~/.config/fish/completions/gpudock.fish

Names come from the daemon, which has one second to answer; $GPUDOCK_COMPLETION_TIMEOUT sets another number of seconds.
"""


@click.command(epilog=_COMPLETION_HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print the completion script for a shell."""
    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"there is no completion for {shell}; give bash, zsh or fish")
    click.echo(made(context.find_root().command, {}, "gpudock", "_GPUDOCK_COMPLETE").source())
