"""The options for the spec of a container."""

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
    """The parsed options; None and () mean that an option is not given."""

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
    click.option("-p", "--publish", type=Port(), multiple=True, help="Publish a port; TCP unless it ends in /udp."),
    click.option(
        "-e",
        "--env",
        type=Variable(),
        multiple=True,
        help="Set an environment variable; without a value, copy it from this shell.",
    ),
    click.option(
        "-v",
        "--volume",
        type=Bind(),
        multiple=True,
        shell_complete=complete_volume_sources,
        help="Mount a volume or a path of the host.",
    ),
    click.option("--tmpfs", type=Tmpfs(), multiple=True, help="Mount a tmpfs."),
    click.option("-l", "--label", type=KeyValueParameter(), multiple=True, help="Set a label."),
    click.option("--cpus", type=Decimal(), help="Limit the CPUs, such as 1.5."),
    click.option("-m", "--memory", type=Size(), help="Limit the memory, such as 8g."),
    click.option("--shm-size", type=Size(), help="Set the size of /dev/shm."),
    click.option("--pids-limit", type=WholeNumber(16), help="Limit the number of processes and threads."),
    click.option("--restart", type=Restart(), help="Set when the engine restarts the process."),
    click.option("--stop-signal", metavar="SIGNAL", help="Set the signal that stops the process, such as SIGINT."),
    click.option("--stop-timeout", type=TimeSpan(), help="Wait this long after the stop signal before SIGKILL."),
    click.option("--health-cmd", help="Check the health with this /bin/sh command."),
    click.option("--hostname", help="Set the host name."),
    click.option("-u", "--user", help="Set the user: NAME or UID, optionally with :GROUP."),
    click.option("-w", "--workdir", help="Set the working directory."),
    click.option("--entrypoint", help="Replace the entrypoint of the image; empty clears it."),
    click.option("-t", "--tty/--no-tty", default=None, help="Allocate a terminal."),
    click.option("-i", "--stdin/--no-stdin", default=None, help="Keep stdin open."),
    click.option(
        "--keep-files",
        type=click.Choice(enum_names(SnapshotPolicy)),
        help="Keep the files of replaced revisions; cheap: only where nothing has to be copied.",
    ),
    click.option("--keep-revisions", type=WholeNumber(1), help="Keep this many revisions."),
    click.option("--keep-for", type=TimeSpan(), help="Keep a replaced revision for this time."),
)


def spec_options(command: F) -> F:
    """Add the options for every field of a spec except its image."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return gpu_options(command)


def spec_fields(flags: SpecFlags) -> dict[str, Any]:
    """Return the given fields of the spec with their values, except the GPUs, which `gpu_choice` returns."""
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
    """Return, for each field that is a message, its given parts: a change keeps the others."""
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
