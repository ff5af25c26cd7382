"""Files and folders that only the daemon may read: secrets, and the state folder."""

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
# Ten thousand tokens, and far more than any key.
_MAX_BYTES = 1 << 20

_log = structlog.stdlib.get_logger(__name__)


def access_problem(found: os.stat_result) -> str:
    """Who beside the daemon may use a file with a secret, as the end of a sentence; empty for nobody.

    Its group may, if that is root's or the daemon's own.
    """
    mode = f"mode {stat.S_IMODE(found.st_mode):04o}"
    if found.st_mode & _OTHERS_MASK:
        return f"is open to every user of this host ({mode})"
    if found.st_mode & _GROUP_MASK and found.st_gid not in (_ROOT, os.getegid()):
        return f"is open to the group {found.st_gid} ({mode})"
    if found.st_uid not in (_ROOT, os.geteuid()):
        return f"belongs to the user {found.st_uid}, who may change it"
    return ""


def chmod_command(path: Path) -> str:
    """The command that makes a file private."""
    return f"chown root {path} && chmod 600 {path}"


def read_regular(path: Path) -> tuple[bytes, os.stat_result]:
    """Read a small regular file, and its status. Raises OSError.

    Anything else is refused without waiting for it: to open a FIFO waits until another process writes to it.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        # Of the file that is read, which may not be what the path names a moment later.
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MAX_BYTES} bytes", str(path))
    return content, found


def read_private(path: Path, setting: str) -> tuple[bytes, os.stat_result]:
    """Read a file that holds a secret, and its status. Raises StartupError where others may use it."""
    try:
        content, found = read_regular(path)
    except OSError as error:
        raise StartupError(f"{setting} {path} cannot be read: {error.strerror}", f"change {setting}") from error
    if exposed := access_problem(found):
        raise StartupError(f"{setting} {path} {exposed}", chmod_command(path))
    return content, found


def require_private(path: Path, setting: str) -> None:
    """Raise StartupError for a file with a secret that is missing, or that others may use; something else reads it."""
    read_private(path, setting)


def make_private_folder(path: Path) -> None:
    """Make the state folder, or close the one that exists to other users. Raises StartupError."""
    try:
        path.mkdir(mode=_OWNER_ONLY, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _restrict_to_owner(path, descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StartupError(
            f"the state folder {path} cannot be made: {error.strerror}",
            "run as root, or choose a --state-dir that you may write to",
        ) from error


def _restrict_to_owner(path: Path, descriptor: int) -> None:
    found = os.fstat(descriptor)
    if found.st_uid not in (_ROOT, os.geteuid()):
        raise StartupError(
            f"the state folder {path} belongs to the user {found.st_uid}, who may change all that is in it",
            f"chown root {path}, or choose another --state-dir",
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & ~_OWNER_ONLY:
        os.fchmod(descriptor, _OWNER_ONLY)
        _log.warning("state folder closed to other users", path=str(path), mode_before=f"{mode:04o}", mode="0700")
