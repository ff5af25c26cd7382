"""How commands print what they show: as a table, as JSON or YAML, or names only."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

if TYPE_CHECKING:
    from gpudock.cli._session import Session

M = TypeVar("M", bound=Message)
R = TypeVar("R")

TABLE, JSON, YAML = "table", "json", "yaml"
FORMATS = click.Choice([TABLE, JSON, YAML])


@dataclass(frozen=True, slots=True)
class View(Generic[M]):
    """How one kind of message is shown.

    `table` has a line for each message, `details` a line for each field of one, and `name` is what other commands
    take to mean it.
    """

    name: Callable[[M], str]
    table: Callable[[Iterable[M]], str]
    details: Callable[[M], str]


def table_only(name: Callable[[M], str], table: Callable[[Iterable[M]], str]) -> View[M]:
    """Return the view of what is only listed."""
    return View(name, table, lambda one: table([one]))


def details_only(name: Callable[[M], str], details: Callable[[M], str]) -> View[M]:
    """Return the view of what is never listed."""
    return View(name, lambda messages: "\n\n".join(map(details, messages)), details)


@dataclass(frozen=True, slots=True)
class Output:
    """What the options say about the output of one run of the command."""

    format: str = TABLE
    names_only: bool = False

    def details(self, message: M, view: View[M]) -> None:
        """Print one message with all its fields."""
        self._one(message, view, view.details)

    def row(self, message: M, view: View[M]) -> None:
        """Print one message as the only line of a table, after a change."""
        self._one(message, view, lambda one: view.table([one]))

    def table(self, messages: Iterable[M], view: View[M]) -> None:
        """Print a list of messages."""
        if self.names_only:
            # A finding that is about no container has no name.
            for name in dict.fromkeys(filter(None, map(view.name, messages))):
                click.echo(name)
        elif self.format == TABLE:
            click.echo(view.table(messages))
        else:
            click.echo(serialized([message_dict(message) for message in messages], self.format), nl=False)

    def _one(self, message: M, view: View[M], text: Callable[[M], str]) -> None:
        if self.names_only:
            click.echo(view.name(message))
        elif self.format == TABLE:
            click.echo(text(message))
        else:
            click.echo(serialized(message_dict(message), self.format), nl=False)


def message_dict(message: Message) -> dict[str, object]:
    """Return the message as proto3's JSON has it (64-bit numbers are strings), with the contract's field names."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def serialized(value: object, output_format: str, *, compact: bool = False) -> str:
    """Return JSON or YAML text that ends a line; `compact` JSON is one line, `compact` YAML one document of many."""
    if output_format == JSON:
        return json.dumps(value, indent=None if compact else 2) + "\n"
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return f"---\n{text}" if compact else text


def output_options(default: str = "") -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Add -o and -q to a command that lists or shows something, and pass it the session with what they say.

    `default` is the format without -o; empty means the one that -o before the command says.
    """

    def decorated(command: Callable[..., R]) -> Callable[..., R]:
        def with_output(session: Session, /, *args: Any, output: str | None, quiet: bool, **kwargs: Any) -> R:  # noqa: ANN401 - those of any command
            shown_as = output or default or session.output.format
            if quiet and shown_as != TABLE:
                if output or not default:
                    raise click.UsageError(f"-q prints names only; it cannot be combined with -o {shown_as}")
                shown_as = TABLE
            return command(replace(session, output=Output(shown_as, names_only=quiet)), *args, **kwargs)

        output_option = click.option(
            "-o", "--output", type=FORMATS, help=f"Print as table, JSON or YAML{_default_help(default)}."
        )
        quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print names only.")
        # The help and the options that the command has already.
        functools.update_wrapper(with_output, command)
        return output_option(quiet_option(functools.update_wrapper(click.pass_obj(with_output), with_output)))

    return decorated


def _default_help(default: str) -> str:
    return f"; default: {default.upper()}" if default else ""
