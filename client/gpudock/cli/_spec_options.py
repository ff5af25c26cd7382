"""The options that say what a container is to be."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import click

from gpudock import HealthCheck, Mount, PortRequest, RestartPolicy, RevisionPolicy, SnapshotPolicy
from gpudock._enums import enum_names, enum_value
from gpudock._spec import duration
from gpudock.cli._arguments import (
    Bind,
    Decimal,
    KeyValueParameter,
    Port,
    Restart,
    Size,
    TimeSpan,
    Tmpfs,
    Variable,
    WholeNumber,
)
from gpudock.cli._completion import complete_volume_sources
from gpudock.cli._gpu_options import GpuFlags, gpu_options

F = TypeVar("F", bound=Callable[..., Any])


class SpecFlags(GpuFlags):
    """The options as click hands them over; None and () are those that were not given."""

    command: tuple[str, ...]
    entrypoint: str | None
    publish: tuple[PortRequest, ...]
    env: tuple[tuple[str, str], ...]
    volume: tuple[Mount, ...]
    tmpfs: tuple[Mount, ...]
    label: tuple[tuple[str, str], ...]
    cpus: float | None
    memory: int | None
    shm_size: int | None
    pids_limit: int | None
    restart: RestartPolicy | None
    stop_signal: str | None
    stop_timeout: timedelta | None
    health_cmd: str | None
    hostname: str | None
    user: str | None
    workdir: str | None
    tty: bool | None
    stdin: bool | None
    keep_files: str | None
    keep_revisions: int | None
    keep_for: timedelta | None


_OPTIONS = (
    click.option("-p", "--publish", type=Port(), multiple=True, help="Publish a port, TCP unless it ends in /udp."),
    click.option(
        "-e",
        "--env",
        type=Variable(),
        multiple=True,
        help="Set an environment variable; without a value, to the one it has here.",
    ),
    click.option(
        "-v",
        "--volume",
        type=Bind(),
        multiple=True,
        shell_complete=complete_volume_sources,
        help="Mount a volume, or a path on the node.",
    ),
    click.option("--tmpfs", type=Tmpfs(), multiple=True, help="Mount a file system in memory."),
    click.option("-l", "--label", type=KeyValueParameter(), multiple=True, help="Set a label."),
    click.option("--cpus", type=Decimal(), help="How many CPUs' worth of time it may use."),
    click.option("-m", "--memory", type=Size(), help="How much memory it may use, such as 8g."),
    click.option("--shm-size", type=Size(), help="The size of /dev/shm."),
    click.option("--pids-limit", type=WholeNumber(16), help="How many processes and threads it may have."),
    click.option("--restart", type=Restart(), help="When the engine starts the process again."),
    click.option("--stop-signal", metavar="SIGNAL", help="The signal that asks the process to end, such as SIGINT."),
    click.option("--stop-timeout", type=TimeSpan(), help="How long the process has from that signal to SIGKILL."),
    click.option("--health-cmd", help="Command of the health check, run by /bin/sh."),
    click.option("--hostname", help="The host name inside."),
    click.option("-u", "--user", help="The user of the process, name or uid, with :group if need be."),
    click.option("-w", "--workdir", help="The working directory of the process."),
    click.option("--entrypoint", help="Replaces the image's entrypoint; empty clears it."),
    click.option("-t", "--tty/--no-tty", default=None, help="Give the process a terminal."),
    click.option("-i", "--stdin/--no-stdin", default=None, help="Keep the process's standard input open."),
    click.option(
        "--keep-files",
        type=click.Choice(enum_names(SnapshotPolicy)),
        help="Whether the files of a revision are kept when the next one replaces it. cheap: where nothing is copied.",
    ),
    click.option("--keep-revisions", type=WholeNumber(1), help="How many revisions are kept."),
    click.option("--keep-for", type=TimeSpan(), help="How long a revision is kept after it was replaced."),
)


def spec_options(command: F) -> F:
    """Add the options for every field of a spec but its image."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return gpu_options(command)


def spec_fields(flags: SpecFlags) -> dict[str, Any]:
    """The fields of a spec that were given, with their values. GPUs are for `gpu_choice`."""
    health = flags["health_cmd"]
    values: dict[str, Any] = {
        "entrypoint": None if flags["entrypoint"] is None else [flags["entrypoint"]],
        "command": flags["command"] or None,
        "env": dict(flags["env"]) or None,
        "working_dir": flags["workdir"],
        "user": flags["user"],
        "hostname": flags["hostname"],
        "tty": flags["tty"],
        "stdin": flags["stdin"],
        "labels": dict(flags["label"]) or None,
        "cpus": flags["cpus"],
        "memory_bytes": flags["memory"],
        "shm_size_bytes": flags["shm_size"],
        "pids_limit": flags["pids_limit"],
        "mounts": [*flags["volume"], *flags["tmpfs"]] or None,
        "ports": flags["publish"] or None,
        "restart_policy": flags["restart"],
        "stop_signal": flags["stop_signal"],
        "stop_timeout": flags["stop_timeout"],
        "health_check": None if health is None else HealthCheck(command=["/bin/sh", "-c", health]),
        "revision_policy": _revision_policy(flags),
    }
    return {name: value for name, value in values.items() if value is not None}


def spec_field_parts(flags: SpecFlags) -> dict[str, tuple[str, ...]]:
    """Which parts of its messages were given: the others stay as they are when a container is changed."""
    policy = {"snapshots": "keep_files", "keep_revisions": "keep_revisions", "keep_for": "keep_for"}
    given = tuple(part for part, flag in policy.items() if flags[flag] is not None)  # type: ignore[literal-required] # keys of SpecFlags
    parts = {"revision_policy": given} if given else {}
    return parts if flags["health_cmd"] is None else parts | {"health_check": ("command",)}


def _revision_policy(flags: SpecFlags) -> RevisionPolicy | None:
    files, revisions, span = flags["keep_files"], flags["keep_revisions"], flags["keep_for"]
    if files is None and revisions is None and span is None:
        return None
    return RevisionPolicy(
        snapshots=SnapshotPolicy.SNAPSHOT_POLICY_UNSPECIFIED if files is None else enum_value(SnapshotPolicy, files),
        keep_revisions=revisions or 0,
        keep_for=None if span is None else duration(span),
    )
