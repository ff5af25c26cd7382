"""What the command's exit codes mean."""

from __future__ import annotations

from collections.abc import Mapping

from gpudock import errors

INTERRUPTED = 130
EXEC_FAILED = 125

# The first class that fits counts.
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
  0   done
  1   another failure
  2   wrong usage, or the server refused a value
  3   not found
  4   too few GPUs, ports or disk
  5   exists already
  6   another operation is at work on it, or it has changed
  7   not possible in its state
  8   the server, its store or its engine does not answer
  9   no identity, or not permitted
  10  the operation was cancelled
  130 interrupted; an operation goes on
`gpudock exec` ends with the command's own code, 128+n after signal n, and
125 if gpudock itself failed.
"""


def exit_code_of(error: errors.GpudockError) -> int:
    """The exit code for an error."""
    return next(code for kind, code in _CODES.items() if isinstance(error, kind))
