"""The options that remove or replace entries of a spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import click

from gpudock import ContainerPort, ContainerSpec
from gpudock.cli._arguments import ContainerPortParameter, Key

F = TypeVar("F", bound=Callable[..., Any])


class EditFlags(TypedDict):
    """The parsed options."""

    env_rm: tuple[str, ...]
    volume_rm: tuple[str, ...]
    port_rm: tuple[ContainerPort, ...]
    label_rm: tuple[str, ...]
    replace_env: bool
    replace_volumes: bool
    replace_ports: bool
    replace_labels: bool
    clear: tuple[str, ...]


_CLEARABLE = tuple(name.replace("_", "-") for name in ContainerSpec.DESCRIPTOR.fields_by_name if name != "image")
_OPTIONS = (
    click.option("--env-rm", type=Key(), multiple=True, help="Remove an environment variable."),
    click.option("--volume-rm", multiple=True, metavar="TARGET", help="Remove the mount or tmpfs at this path."),
    click.option("--port-rm", type=ContainerPortParameter(), multiple=True, help="Remove a published port."),
    click.option("--label-rm", type=Key(), multiple=True, help="Remove a label."),
    click.option("--replace-env", is_flag=True, help="With -e: remove all other variables."),
    click.option("--replace-volumes", is_flag=True, help="With -v or --tmpfs: remove all other mounts."),
    click.option("--replace-ports", is_flag=True, help="With -p: remove all other published ports."),
    click.option("--replace-labels", is_flag=True, help="With --label: remove all other labels."),
    click.option(
        "--clear",
        type=click.Choice(_CLEARABLE),
        multiple=True,
        metavar="FIELD",
        help="Clear a field: env, mounts, ports, command, ... Can be repeated.",
    ),
)
# Field of the spec -> its options to add, remove and replace, then the arguments of the client to add and remove.
_EDITABLE_FIELDS = {
    "env": ("-e", "env_rm", "replace_env", "set_env", "remove_env"),
    "mounts": ("-v or --tmpfs", "volume_rm", "replace_volumes", "add_mounts", "remove_mounts"),
    "ports": ("-p", "port_rm", "replace_ports", "add_ports", "remove_ports"),
    "labels": ("--label", "label_rm", "replace_labels", "set_labels", "remove_labels"),
}


def edit_options(command: F) -> F:
    """Add the options that `change_arguments` reads."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def change_arguments(given: dict[str, Any], parts: dict[str, tuple[str, ...]], flags: EditFlags) -> dict[str, Any]:
    """Return keyword arguments for the client's `update` and `clone`; empty if nothing changes.

    `given` maps fields of the spec to their new values. Of a field in `parts`, only the parts named there change.
    """
    cleared = {name.replace("-", "_") for name in flags["clear"]}
    changes = dict(given)
    for field, (adds, removes, replaces, add, remove) in _EDITABLE_FIELDS.items():
        removed, replace = flags[removes], flags[replaces]  # type: ignore[literal-required] # keys of EditFlags
        if replace and (field not in given or removed):
            wrong = (
                f"cannot be combined with {_option(removes)}"
                if removed
                else f"needs {adds}; to remove all use --clear {field}"
            )
            raise click.UsageError(f"{_option(replaces)} {wrong}")
        if field in cleared and removed:
            raise click.UsageError(
                f"--clear {field} removes all entries; it cannot be combined with {_option(removes)}"
            )
        if removed:
            changes[remove] = list(removed)
        if field in given and not replace and field not in cleared:
            changes[add] = changes.pop(field)
    for field in cleared & given.keys():
        instead = (
            f"; to replace all entries use --{_EDITABLE_FIELDS[field][2].replace('_', '-')}"
            if field in _EDITABLE_FIELDS
            else ""
        )
        raise click.UsageError(f"--clear {_kebab_case(field)} cannot be combined with a new value{instead}")
    whole = [field for field in given if field in changes and field not in parts]
    changes |= dict.fromkeys(sorted(cleared))
    mask = [*whole, *sorted(cleared), *(f"{field}.{part}" for field in parts for part in parts[field])]
    return changes | {"update_mask": mask} if changes else {}


def _option(name: str) -> str:
    return f"--{_kebab_case(name)}"


def _kebab_case(name: str) -> str:
    return name.replace("_", "-")
