"""Read settings from flags, the environment and a file, in this order of precedence, and print them as a file.

Every setting has one name: `port_range` in the file, `GPUDOCK_PORT_RANGE` in the environment, `--port-range` as a flag.
"""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import CliSettingsSource, EnvSettingsSource
from typing_extensions import override

from gpudock_server.settings.definitions import Settings
from gpudock_server.settings.value_types import Metavar

PROGRAM = "gpudockd"
DEFAULT_CONFIG = Path("/etc/gpudock/gpudockd.toml")
_BY_DEFAULT = "default"

_EPILOG = f"""\
Every setting can be given as a flag, in the environment (--port-range is GPUDOCK_PORT_RANGE) or in a TOML file
(port_range = "20000-29999"). Precedence: flags, environment, file. Lists are separated by commas, or the flag is
repeated. Times are seconds, or have a unit: 500ms, 30s, 5m, 24h.

The default file is {DEFAULT_CONFIG}; --config or GPUDOCK_CONFIG names another.
--print-config prints the effective settings as such a file, with the origin of each value.

Exit codes: 0 after a clean shutdown, 1 if the daemon cannot start or continue, 2 for invalid settings.
"""


class SettingsInvalid(Exception):
    """The settings are invalid; each line says what is wrong with one setting, and where it was set."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and the origin of each: a flag, a variable, a file, or `default`."""

    settings: Settings
    origins: Mapping[str, str]
    print_config: bool = False
    attach_volumes: bool = False

    def to_toml(self) -> str:
        """Return the effective settings as a config file from which the same settings are loaded."""
        values = self.settings.model_dump(mode="json")
        return "".join(
            f"{name} = {_toml(values[name])}  # {self.origins.get(name, _BY_DEFAULT)}\n"
            for name in Settings.model_fields
        )


def load(arguments: Sequence[str]) -> LoadedSettings:
    """Load the settings from all sources. Raises SettingsInvalid, and SystemExit(0) after --help and --version."""
    parser, flags = _parser()
    parsed = parser.parse_args(arguments)
    config = _config_file(parsed.config or os.environ.get("GPUDOCK_CONFIG", ""))
    # Lowest precedence first: a later source overrides an earlier one.
    sources: tuple[tuple[Mapping[str, Any], Callable[[str], str]], ...] = (
        (_from_file(config), lambda _name: str(config)),
        (EnvSettingsSource(Settings)(), lambda name: f"GPUDOCK_{name.upper()}"),
        (flags(parsed_args=parsed)(), lambda name: f"--{name.replace('_', '-')}"),
    )
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for found, origin in sources:
        values |= found
        origins |= {name: origin(name) for name in found}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsInvalid([line for problem in error.errors() for line in _lines(problem, origins)]) from None
    return LoadedSettings(settings, origins, print_config=parsed.print_config, attach_volumes=parsed.attach_volumes)


def _config_file(named: str) -> Path | None:
    if named:
        return Path(named)
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsInvalid([f"{path}: {error.strerror}"]) from None
    except ValueError as error:
        # Not TOML, or not UTF-8; both errors contain the position.
        raise SettingsInvalid([f"{path}: {error}"]) from None


def _lines(problem: ErrorDetails, origins: Mapping[str, str]) -> list[str]:
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if not problem["loc"]:
        # Settings that do not fit together; the message starts with their names and a colon.
        return [_with_origins(line, line.partition(":")[0].split(", "), origins) for line in message.splitlines()]
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        alike = get_close_matches(name, Settings.model_fields, n=1)
        message = "unknown setting" + "".join(f"; did you mean {other}?" for other in alike)
    else:
        message = f"{message}, not {problem['input']!r}"
    return [_with_origins(f"{name}: {message}", [name], origins)]


def _with_origins(line: str, names: Sequence[str], origins: Mapping[str, str]) -> str:
    found = [origins[name] for name in names if name in origins]
    return f"{line} ({', '.join(dict.fromkeys(found))})" if found else line


def _toml(value: object) -> str:
    match value:
        case None:
            return '""'
        case float() if value.is_integer():
            return str(int(value))
        case _:
            # JSON text, numbers and lists of text are valid TOML, except for the delete character.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise SettingsInvalid([message, f"see {PROGRAM} --help"])


def _parser() -> tuple[_Parser, CliSettingsSource[Any]]:
    parser = _Parser(
        PROGRAM,
        usage=f"{PROGRAM} [--config PATH] [--SETTING VALUE]... [--print-config]",
        description="Daemon that manages GPU containers on this host.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    parser.add_argument("--config", metavar="PATH", help=f"TOML file with settings (default: {DEFAULT_CONFIG})")
    parser.add_argument("--print-config", action="store_true", help="print the effective settings and exit")
    parser.add_argument(
        "--attach-volumes",
        action="store_true",
        help="attach volumes with a size and bind host paths before the engine starts, then exit",
    )
    flags: CliSettingsSource[Any] = CliSettingsSource(
        Settings,
        root_parser=parser,
        cli_kebab_case=True,
        cli_avoid_json=True,
        add_argument_method=partial(_add_argument, Settings().model_dump(mode="json")),
    )
    return parser, flags


def _add_argument(
    defaults: Mapping[str, object],
    parser: argparse.ArgumentParser,
    *names: str,
    **options: Any,  # noqa: ANN401 - the options of argparse have values of any type
) -> argparse.Action:
    """Add an argument as CliSettingsSource does, without the Python types and values in its help."""
    field = Settings.model_fields[options["dest"]]
    default = defaults[options["dest"]]
    options["metavar"] = next(item.metavar for item in field.metadata if isinstance(item, Metavar))
    shown = str(default).lower() if isinstance(default, bool) else default
    options["help"] = f"{field.description} (default: {shown})" if shown or shown == 0 else field.description
    return parser.add_argument(*names, **options)


def _version() -> str:
    try:
        return version("gpudock")
    except PackageNotFoundError:
        return "(not installed)"
