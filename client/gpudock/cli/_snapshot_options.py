"""The option that says whether the files of the revision that a change ends are kept."""

from __future__ import annotations

import click

from gpudock import SnapshotPolicy
from gpudock._enums import words_of

snapshots_option = click.option(
    "--snapshots",
    type=click.Choice(words_of(SnapshotPolicy)),
    help="Whether the files as they are before the change are kept. cheap: where nothing is copied.",
)
