"""Errors of volume backings as domain errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpudock_server.adapters.host.disk_space import available
from gpudock_server.adapters.host.subprocesses import ProgramFailed
from gpudock_server.adapters.volumes.backing_folder import BackingDamaged
from gpudock_server.errors import DiskFull, VolumeFailed, VolumeTooSmallForData
from gpudock_server.model.volume import VolumeBacking, VolumeUsage

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


def require_fitting(backing: VolumeBacking, usage: VolumeUsage, size_bytes: int) -> None:
    """Raise VolumeTooSmallForData if the files of a volume do not fit into `size_bytes`."""
    if size_bytes < usage.minimum_bytes:
        raise VolumeTooSmallForData(
            volume=backing.name,
            requested_bytes=size_bytes,
            used_bytes=usage.used_bytes,
            minimum_bytes=usage.minimum_bytes,
        )


def _full(root: Path, needed_bytes: int) -> DiskFull:
    return DiskFull(path=str(root), needed_bytes=needed_bytes, available_bytes=available(str(root)))
