"""The options of `gpudock` itself, and the list of its commands."""

from __future__ import annotations

import copy
from pathlib import Path

import click

from gpudock._channel import ADDRESS_VARIABLE, DEFAULT_ADDRESS, TOKEN_FILE_VARIABLE
from gpudock.cli import (
    _clone,
    _commit,
    _completion,
    _create,
    _exec,
    _inspect,
    _lifecycle,
    _operations,
    _revisions,
    _scale,
    _update,
    _volumes,
    _watch,
)
from gpudock.cli._exit_codes import EXIT_CODE_HELP
from gpudock.cli._output import FORMATS, TABLE, Output
from gpudock.cli._session import Connection, Session


class _Commands(click.Group):
    """The commands. Text that is not UTF-8 is a usage error, since no message can carry it."""

    def add_alias(self, command: click.Command, name: str) -> None:
        """Add a command under a second name."""
        alias = copy.copy(command)
        alias.short_help = f"Alias for {command.name}."
        self.add_command(alias, name)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command, or raise a usage error."""
        try:
            return super().invoke(ctx)
        except UnicodeEncodeError as error:
            raise click.UsageError(f"{error.object!r} is not UTF-8") from error


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(cls=_Commands, epilog=EXIT_CODE_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpudock")
@click.option(
    "--address",
    envvar=ADDRESS_VARIABLE,
    default=DEFAULT_ADDRESS,
    show_default=True,
    show_envvar=True,
    help="Connect to gpudockd here: unix:/path, a path, or HOST:PORT.",
)
@click.option(
    "--token-file",
    envvar=TOKEN_FILE_VARIABLE,
    show_envvar=True,
    type=_FILE,
    help="Read the token from this file.",
)
@click.option("--tls", is_flag=True, help="Use TLS; trust the system's roots unless --ca is given.")
@click.option("--ca", type=_FILE, help="Trust the roots in this PEM file; implies --tls.")
@click.option("--cert", type=_FILE, help="Send the client certificate in this PEM file; implies --tls.")
@click.option("--key", type=_FILE, help="Use the private key in this PEM file with --cert.")
@click.option(
    "-o",
    "--output",
    type=FORMATS,
    default=TABLE,
    show_default=True,
    help="Print results as table, JSON or YAML; progress and errors go to stderr.",
)
@click.pass_context
def main(
    context: click.Context,
    *,
    address: str,
    token_file: Path | None,
    tls: bool,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    output: str,
) -> None:
    """Manage GPU containers."""
    if (cert is None) != (key is None):
        raise click.UsageError("--cert and --key are needed together; one is missing")
    context.obj = Session(Connection(address, token_file, tls, ca, cert, key), Output(output))


for _command in (
    _create.create,
    _create.run,
    _inspect.get,
    _inspect.inspect,
    _inspect.list_containers,
    _watch.watch,
    _lifecycle.start,
    _lifecycle.stop,
    _lifecycle.kill,
    _lifecycle.restart,
    _lifecycle.pause,
    _lifecycle.unpause,
    _lifecycle.delete,
    _scale.scale,
    _commit.commit,
    _update.update,
    _revisions.rollback,
    _clone.clone,
    _revisions.revisions,
    _revisions.revision,
    _exec.exec_command,
    _volumes.volume,
    _inspect.gpus,
    _inspect.ports,
    _inspect.drift,
    _inspect.node,
    _operations.operations,
    _completion.completion,
):
    main.add_command(_command)
main.add_alias(_inspect.list_containers, "ps")
main.add_alias(_lifecycle.delete, "rm")
