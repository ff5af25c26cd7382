"""gpudockd: flags and environment -> Settings -> run.

Exit codes: 0 after a clean shutdown, 1 when the daemon cannot start or go on, 2 for a mistake in its settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gpudock_server.settings.sources import PROGRAM, SettingsInvalid, load
from gpudock_server.startup import StartupError

EXIT_FAILED = 1
EXIT_MISUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        loaded = load(sys.argv[1:] if arguments is None else arguments)
    except SettingsInvalid as error:
        for line in error.lines:
            _print_error(line)
        return EXIT_MISUSED
    if loaded.print_config:
        sys.stdout.write(loaded.to_toml())
        return 0
    # Here and not above: --help and --print-config are quick, and work where the engine's parts do not.
    from gpudock_server import app  # noqa: PLC0415 - see above

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
