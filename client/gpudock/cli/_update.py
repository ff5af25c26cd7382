"""`gpudock update`."""

from __future__ import annotations

from typing import Any, Unpack

import click

from gpudock import Client, Container, OperationCall
from gpudock._enums import enum_names
from gpudock.cli._arguments import Positive
from gpudock.cli._completion import container_argument
from gpudock.cli._confirm_change import change, validate_only_option, yes_option
from gpudock.cli._edit_options import EditFlags, change_arguments, edit_options
from gpudock.cli._gpu_options import gpu_choice, resolve_gpus
from gpudock.cli._output import output_options
from gpudock.cli._session import Session
from gpudock.cli._snapshot_options import snapshots_option
from gpudock.cli._spec_options import SpecFlags, spec_field_parts, spec_fields, spec_options
from gpudock.v1.container_service_pb2 import FilesPolicy, PullPolicy


class _Flags(SpecFlags, EditFlags):
    """The parsed options."""

    name: str
    image: str | None
    files: str | None
    pull: str
    pull_stall_timeout: float | None
    snapshots: str | None
    validate_only: bool
    yes: bool


@click.command()
@container_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--image", help="Change the image; see --files.")
@spec_options
@edit_options
@click.option(
    "--files",
    type=click.Choice(enum_names(FilesPolicy)),
    help="With --image: keep the files on top of the new image, or discard them.",
)
@click.option(
    "--pull",
    type=click.Choice(enum_names(PullPolicy)),
    default="missing",
    show_default=True,
    help="When to pull the image.",
)
@click.option(
    "--pull-stall-timeout",
    type=Positive(),
    metavar="SECONDS",
    help="Fail if the pull makes no progress for this time.",
)
@snapshots_option
@validate_only_option
@yes_option
@output_options()
def update(session: Session, **flags: Unpack[_Flags]) -> None:
    """Update the spec of a container; its files are kept.

    -e, -v, --tmpfs, -p and --label add an entry or replace the one of the same name; --env-rm, --volume-rm, --port-rm
    and --label-rm remove one. Write COMMAND after `--`.

    Example: gpudock update train -e LR=0.1 --env-rm DEBUG -- python train.py
    """
    given, parts, choice = spec_fields(flags), spec_field_parts(flags), gpu_choice(flags)
    if flags["image"] is not None:
        given = {"image": flags["image"], **given}
    if choice is None and not change_arguments(given, parts, flags):
        raise click.UsageError("nothing to change: give --image, --env, --publish, --clear or another option")
    gpus, etag = session.run(lambda client: resolve_gpus(client, flags["name"], choice))
    changes = change_arguments(given if gpus is None else {**given, "gpus": gpus}, parts, flags)

    def begin(client: Client, *, validate_only: bool, etag: str) -> OperationCall[Container]:
        return _begin(client, flags, changes, etag, validate_only=validate_only)

    change(session, flags["name"], begin, etag=etag, validate_only=flags["validate_only"], yes=flags["yes"])


def _begin(
    client: Client, flags: _Flags, changes: dict[str, Any], etag: str, *, validate_only: bool
) -> OperationCall[Container]:
    return client.containers.update(
        flags["name"],
        files=flags["files"],
        pull=flags["pull"],
        pull_stall_timeout=flags["pull_stall_timeout"],
        snapshots=flags["snapshots"],
        validate_only=validate_only,
        etag=etag,
        **changes,
    )
