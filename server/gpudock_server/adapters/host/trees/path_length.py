"""How long the paths in a tree are, for programs that reach files by path."""

from __future__ import annotations

import os

from gpudock_server.adapters.host.trees.folders import GONE_ERRNOS, ROOT, FolderTree, OpenFolders
from gpudock_server.adapters.host.trees.interrupt import Interrupt


def longest_path(source: int, interrupt: Interrupt) -> int:
    """The length in bytes of the longest path in a tree, without what leads to the tree; `source` is its descriptor."""
    device, longest = os.fstat(source).st_dev, 0
    folder_tree, lengths = FolderTree(), [0]
    waiting: list[tuple[int, str, int]] = [(ROOT, "", 0)]
    with OpenFolders(source, folder_tree) as open_folders:
        while waiting:
            parent, name, length = waiting.pop()
            folder = folder_tree.add(parent, name) if name else ROOT
            try:
                here = open_folders.enter(folder)
            except OSError as error:
                if error.errno not in GONE_ERRNOS:
                    raise
                folder_tree.drop_last()
                continue
            if name:
                lengths.append(length)
            with os.scandir(here) as entries:
                for item in entries:
                    interrupt.check()
                    reached = lengths[folder] + len(os.fsencode(item.name))
                    longest = max(longest, reached)
                    try:
                        status = item.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if item.is_dir(follow_symlinks=False) and status.st_dev == device:
                        waiting.append((folder, item.name, reached + 1))
    return longest
