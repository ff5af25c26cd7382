"""Measure a tree: bytes that a copy takes, number of entries, and the longest path."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from gpudock_server.adapters.host.trees.folders import GONE_ERRNOS, ROOT, FolderTree, OpenFolders
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.limits import EntryCounter, Limits
from gpudock_server.adapters.host.trees.snapshot_index import Index, key_of

_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class TreeSize:
    """The size of a tree. `bytes` is the space on disk that a copy takes."""

    bytes: int
    entries: int


def measure(source: int, previous: Index | None, interrupt: Interrupt, limits: Limits | None = None) -> TreeSize:
    """Estimate the bytes on disk of a copy of the entries that `previous` does not have. Raises TreeTooLargeError."""
    device, total = os.fstat(source).st_dev, 0
    known = previous.walk() if previous and previous.device == device else ()
    states = {entry.key for _, _, entry in known if entry.settled}
    linked: set[int] = set()
    folder_tree, counter = FolderTree(), EntryCounter(limits)
    waiting: list[tuple[int, str]] = [(ROOT, "")]
    with OpenFolders(source, folder_tree) as open_folders:
        while waiting:
            parent, name = waiting.pop()
            folder = folder_tree.add(parent, name) if name else ROOT
            counter.folder(folder_tree.depths[folder])
            try:
                here = open_folders.enter(folder)
            except OSError as error:
                if error.errno in GONE_ERRNOS:
                    folder_tree.drop_last()
                    continue
                raise
            with os.scandir(here) as entries:
                for item in entries:
                    interrupt.check()
                    try:
                        status = item.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if status.st_dev != device:
                        continue
                    counter.entry(item.name)
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append((folder, item.name))
                    elif key_of(status) in states or status.st_ino in linked:
                        continue
                    elif status.st_nlink > 1:
                        linked.add(status.st_ino)
                    total += status.st_blocks * _BLOCK_BYTES
    return TreeSize(bytes=total, entries=counter.entries)


def longest_path(source: int, interrupt: Interrupt) -> int:
    """Return the length in bytes of the longest path in a tree, relative to its root; `source` is its descriptor."""
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
