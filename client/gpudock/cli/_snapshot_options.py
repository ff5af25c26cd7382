"""The option that says whether the files of the revision that a change ends are kept."""

from __future__ import annotations

import click

from gpudock import SnapshotPolicy
from gpudock._enums import enum_names

snapshots_option = click.option(
    "--snapshots",
    type=click.Choice(enum_names(SnapshotPolicy)),
    help="Whether the files as they are before the change are kept. cheap: where nothing is copied.",
)
