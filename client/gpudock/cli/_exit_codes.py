"""The exit codes of `gpudock`."""

from __future__ import annotations

from collections.abc import Mapping

from gpudock import errors

INTERRUPTED = 130
EXEC_FAILED = 125

# The first class that matches decides.
_CODES: Mapping[type[errors.GpudockError], int] = {
    errors.InvalidArgument: 2,
    errors.NotFound: 3,
    errors.Exhausted: 4,
    errors.AlreadyExists: 5,
    errors.Aborted: 6,
    errors.PreconditionFailed: 7,
    errors.Unavailable: 8,
    errors.DeadlineExceeded: 8,
    errors.Unauthenticated: 9,
    errors.PermissionDenied: 9,
    errors.Cancelled: 10,
    errors.GpudockError: 1,
}

EXIT_CODE_HELP = """\b
Exit codes:
  0   success
  1   any other failure
  2   wrong usage or invalid value
  3   not found
  4   not enough GPUs, ports or disk space
  5   already exists
  6   busy with another operation, or changed meanwhile
  7   not possible in the current state
  8   the daemon, its store or its engine does not answer
  9   not authenticated or not permitted
  10  the operation was cancelled
  130 interrupted; a running operation continues
`gpudock exec` exits with the code of the command inside, 128+n after
signal n, and 125 if gpudock itself failed.
"""


def exit_code_of(error: errors.GpudockError) -> int:
    """Return the exit code for an error."""
    return next(code for kind, code in _CODES.items() if isinstance(error, kind))
