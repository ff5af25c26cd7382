"""Read the extended attributes of an entry."""

from __future__ import annotations

import errno
import os

# The filesystem has no extended attributes, or an attribute was removed since it was listed.
NO_XATTRS_ERRNOS = frozenset({errno.ENOTSUP, errno.ENODATA})


def read_xattrs(entry: int | str, *, follow: bool) -> dict[str, bytes]:
    """Return the extended attributes of an open file or a path; `follow`: also of what a symbolic link points to."""
    try:
        names = os.listxattr(entry, follow_symlinks=follow)
        return {name: os.getxattr(entry, name, follow_symlinks=follow) for name in names}
    except OSError as error:
        if error.errno in NO_XATTRS_ERRNOS:
            return {}
        raise
