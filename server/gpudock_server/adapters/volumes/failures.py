"""Convert errors of volume backings to domain errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpudock_server.adapters.host.subprocesses import ProgramFailed
from gpudock_server.adapters.volumes.backing_folder import BackingDamaged
from gpudock_server.errors import DiskFull, VolumeFailed

_NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def volume_errors(call: str, name: str, root: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Convert errors: DiskFull if the filesystem of `root` is full, VolumeFailed for other errors of the host.

    `call` completes the sentence "could not ... volume NAME".
    """
    try:
        yield
    except ProgramFailed as error:
        if error.no_space:
            raise _full(root, needed_bytes) from error
        raise VolumeFailed(volume=name, call=call, detail=str(error)) from error
    except OSError as error:
        if error.errno in _NO_SPACE_ERRNOS:
            raise _full(root, needed_bytes) from error
        raise VolumeFailed(volume=name, call=call, detail=f"{error.strerror} ({error.filename})") from error
    except (BackingDamaged, ValueError) as error:
        raise VolumeFailed(volume=name, call=call, detail=str(error)) from error


def _full(root: Path, needed_bytes: int) -> DiskFull:
    filesystem = os.statvfs(root)
    return DiskFull(
        path=str(root), needed_bytes=needed_bytes, available_bytes=filesystem.f_bavail * filesystem.f_frsize
    )
