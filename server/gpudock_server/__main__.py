"""The command gpudockd: load the settings from flags, environment and file, then run the daemon.

Exit codes: 0 after a clean shutdown, 1 if the daemon cannot start or continue, 2 for invalid settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gpudock_server.settings.sources import PROGRAM, SettingsInvalid, load
from gpudock_server.startup import StartupError

EXIT_FAILED = 1
EXIT_INVALID_SETTINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        loaded = load(sys.argv[1:] if arguments is None else arguments)
    except SettingsInvalid as error:
        for line in error.lines:
            _print_error(line)
        return EXIT_INVALID_SETTINGS
    if loaded.print_config:
        sys.stdout.write(loaded.to_toml())
        return 0
    # Imported late: --help and --print-config must be fast, and work where the libraries of the daemon do not load.
    from gpudock_server import app  # noqa: PLC0415 - see the comment above

    try:
        if loaded.attach_volumes:
            return app.attach_volumes(loaded.settings)
        return app.run(loaded.settings)
    except StartupError as error:
        for line in str(error).splitlines():
            _print_error(line)
        return EXIT_FAILED


def _print_error(line: str) -> None:
    sys.stderr.write(f"{PROGRAM}: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
