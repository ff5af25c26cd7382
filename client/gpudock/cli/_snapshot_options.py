"""The option that decides whether the files of the replaced revision are kept."""

from __future__ import annotations

import click

from gpudock import SnapshotPolicy
from gpudock._enums import enum_names

snapshots_option = click.option(
    "--snapshots",
    type=click.Choice(enum_names(SnapshotPolicy)),
    help="Keep the files of before the change; cheap: only where nothing has to be copied.",
)
