"""The options that change single entries of a spec, or all entries of a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import click

from gpudock import ContainerPort, ContainerSpec
from gpudock.cli._arguments import ContainerPortParameter, Key

F = TypeVar("F", bound=Callable[..., Any])


class EditFlags(TypedDict):
    """The options as click hands them over."""

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
    click.option("--volume-rm", multiple=True, metavar="TARGET", help="Remove the mount at this path, also a tmpfs."),
    click.option("--port-rm", type=ContainerPortParameter(), multiple=True, help="Do not publish this port any more."),
    click.option("--label-rm", type=Key(), multiple=True, help="Remove a label."),
    click.option("--replace-env", is_flag=True, help="With -e: remove every other variable."),
    click.option("--replace-volumes", is_flag=True, help="With -v or --tmpfs: remove every other mount."),
    click.option("--replace-ports", is_flag=True, help="With -p: publish no other port."),
    click.option("--replace-labels", is_flag=True, help="With --label: remove every other label."),
    click.option(
        "--clear",
        type=click.Choice(_CLEARABLE),
        multiple=True,
        metavar="FIELD",
        help="Unset a field: env, mounts, ports, command ... Can be repeated.",
    ),
)
# Field of the spec -> the option that adds to it, that which removes from it, and that which replaces all of it.
_EDITABLE_FIELDS = {
    "env": ("-e", "env_rm", "replace_env", "set_env", "remove_env"),
    "mounts": ("-v or --tmpfs", "volume_rm", "replace_volumes", "add_mounts", "remove_mounts"),
    "ports": ("-p", "port_rm", "replace_ports", "add_ports", "remove_ports"),
    "labels": ("--label", "label_rm", "replace_labels", "set_labels", "remove_labels"),
}


def edit_options(command: F) -> F:
    """Add the options, for `change_arguments`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def change_arguments(given: dict[str, Any], parts: dict[str, tuple[str, ...]], flags: EditFlags) -> dict[str, Any]:
    """Keyword arguments for `update` and `clone`: whole fields, edits of entries, and the mask.

    `given` are the fields that were given values. Of those in `parts`, only the fields named there change.
    """
    cleared = {name.replace("-", "_") for name in flags["clear"]}
    changes = dict(given)
    for field, (adds, removes, replaces, add, remove) in _EDITABLE_FIELDS.items():
        removed, replace = flags[removes], flags[replaces]  # type: ignore[literal-required] # keys of EditFlags
        if replace and (field not in given or removed):
            wrong = (
                f"does not go with {_option(removes)}" if removed else f"needs {adds}; to remove all: --clear {field}"
            )
            raise click.UsageError(f"{_option(replaces)} {wrong}")
        if field in cleared and removed:
            raise click.UsageError(f"--clear {field} removes all; {_option(removes)} does not go with it")
        if removed:
            changes[remove] = list(removed)
        if field in given and not replace and field not in cleared:
            changes[add] = changes.pop(field)
    for field in cleared & given.keys():
        instead = (
            f"; to replace all, --{_EDITABLE_FIELDS[field][2].replace('_', '-')}" if field in _EDITABLE_FIELDS else ""
        )
        raise click.UsageError(f"--clear {_kebab_case(field)} does not go with a value for it{instead}")
    whole = [field for field in given if field in changes and field not in parts]
    changes |= dict.fromkeys(sorted(cleared))
    mask = [*whole, *sorted(cleared), *(f"{field}.{part}" for field in parts for part in parts[field])]
    return changes | {"update_mask": mask} if changes else {}


def _option(name: str) -> str:
    return f"--{_kebab_case(name)}"


def _kebab_case(name: str) -> str:
    return name.replace("_", "-")
