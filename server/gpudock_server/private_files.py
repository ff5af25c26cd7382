"""Read files with secrets and create the state directory, which only the daemon may read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import structlog

from gpudock_server.startup import StartupError

_ROOT = 0
_OTHERS_MASK = 0o007
_GROUP_MASK = 0o070
_OWNER_ONLY = 0o700
# Holds ten thousand tokens; keys are far smaller.
_MAX_BYTES = 1 << 20

_log = structlog.stdlib.get_logger(__name__)


def access_problem(found: os.stat_result) -> str:
    """Why other users can use a file with a secret, as the end of a sentence; empty if they cannot.

    The group of the file has access if it is the group of root or of the daemon.
    """
    mode = f"mode {stat.S_IMODE(found.st_mode):04o}"
    if found.st_mode & _OTHERS_MASK:
        return f"is accessible to every user of this host ({mode})"
    if found.st_mode & _GROUP_MASK and found.st_gid not in (_ROOT, os.getegid()):
        return f"is accessible to group {found.st_gid} ({mode})"
    if found.st_uid not in (_ROOT, os.geteuid()):
        return f"is owned by uid {found.st_uid}; it must be root or the daemon's user"
    return ""


def chmod_command(path: Path) -> str:
    """Return the shell command that makes a file private."""
    return f"chown root {path} && chmod 600 {path}"


def read_regular(path: Path) -> tuple[bytes, os.stat_result]:
    """Read a regular file of at most 1 MiB; returns its content and its status. Raises OSError.

    O_NONBLOCK: opening a FIFO would otherwise wait until another process writes to it.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        # The status of the open file: the path may already name another one.
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {_MAX_BYTES} bytes", str(path))
    return content, found


def read_private(path: Path, setting: str) -> tuple[bytes, os.stat_result]:
    """Read a file with a secret; returns its content and its status. Raises StartupError if others can access it."""
    try:
        content, found = read_regular(path)
    except OSError as error:
        raise StartupError(f"{setting} {path} cannot be read: {error.strerror}", f"correct {setting}") from error
    if exposed := access_problem(found):
        raise StartupError(f"{setting} {path} {exposed}", chmod_command(path))
    return content, found


def require_private(path: Path, setting: str) -> None:
    """Raise StartupError if a file with a secret is missing or others can access it. Its content is read elsewhere."""
    read_private(path, setting)


def make_private_folder(path: Path) -> None:
    """Create the state directory, or deny other users access to an existing one. Raises StartupError."""
    try:
        path.mkdir(mode=_OWNER_ONLY, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _restrict_to_owner(path, descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StartupError(
            f"cannot create state_dir {path}: {error.strerror}",
            "run as root, or choose a --state-dir that this user can write to",
        ) from error


def _restrict_to_owner(path: Path, descriptor: int) -> None:
    found = os.fstat(descriptor)
    if found.st_uid not in (_ROOT, os.geteuid()):
        raise StartupError(
            f"state_dir {path} is owned by uid {found.st_uid}; it must be root or the daemon's user",
            f"chown root {path}, or choose another --state-dir",
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & ~_OWNER_ONLY:
        os.fchmod(descriptor, _OWNER_ONLY)
        _log.warning("state_dir mode changed", path=str(path), mode_before=f"{mode:04o}", mode="0700")
