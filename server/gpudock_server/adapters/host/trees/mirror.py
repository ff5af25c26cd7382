"""Make one tree equal to another in several passes, each in proportion to what has changed since the last.

The source may change during all passes but the last. Changes are detected by inode number and ctime (see
snapshot_index), never by path, size and mtime alone. Unchanged files are left as they are, or linked: from their old
place in the copy if a folder was renamed, or from an earlier copy.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gpudock_server.adapters.host.trees.entry_copy import EntryCopier, match_xattrs
from gpudock_server.adapters.host.trees.folders import GONE_ERRNOS, ROOT, OpenFolders, remove_entry
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.limits import EntryCounter, Limits
from gpudock_server.adapters.host.trees.snapshot_index import OPAQUE_XATTR, Index, IndexEntry, Key, is_whiteout, key_of

# Two changes within one tick of the kernel's clock have the same ctime. Ticks are 10 ms at most. This value is much
# larger, and covers direct writes too, whose ctime is set when they begin.
TICK_NS = 1_000_000_000
# ext4 allows 65,000. Beyond this number a file is copied.
_MAX_LINKS = 60_000
_BLOCK_BYTES = 512
# EPERM: the name is now a folder.
_CANNOT_LINK = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EMLINK, errno.EXDEV, errno.EPERM})
_HANDLE_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
_STAGED_NAME = "new"
_UNKNOWN = IndexEntry((0, 0, 0, 0, stat.S_IFDIR, 0, 0, 0), copy=0, settled=False, shared=False)


class CopyIndex:
    """A tree of copies with its index. Entries are found by folder and name, or by the inode of the original.

    `device` is the filesystem of the source; if the index is of another one, its inode numbers are not used.
    """

    def __init__(self, index: Index, root: int, device: int) -> None:
        self.index = index
        self._same_device = index.device == device
        self.open_folders = OpenFolders(root, index.folder_tree)
        self._locations: dict[int, tuple[int, str]] | None = None

    def link(self, folder: int | None, name: str, key: Key, names: int, staging: int) -> IndexEntry | None:
        """Link a copy of the state `key` into the staging folder; None if there is none.

        `folder` is the number, in this index, of the folder that is searched first. `names` is the number of links that
        the copy will get.
        """
        for where, called in self._candidates(folder, name, key) if self._same_device else ():
            entry = self.index.entries[where][called]
            if not entry.settled or entry.key != key:
                continue
            try:
                at = self.open_folders.enter(where)
                os.link(called, _STAGED_NAME, src_dir_fd=at, dst_dir_fd=staging, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
                continue
            # Only the inode number proves that this is the copy in the index.
            linked = os.stat(_STAGED_NAME, dir_fd=staging, follow_symlinks=False)
            if linked.st_ino == entry.copy and linked.st_nlink + names < _MAX_LINKS:
                return entry
            os.unlink(_STAGED_NAME, dir_fd=staging)
        return None

    def open_like(self, folder: int | None, name: str, key: Key) -> tuple[int, IndexEntry] | None:
        """Open the copy in a folder if it matches `key` except for inode and ctime: it may have the same content."""
        entry = self.index.entry(folder, name)
        if folder is None or entry is None or entry.key[2:] != key[2:] or not stat.S_ISREG(key[4]):
            return None
        try:
            file = os.open(name, _READ_FLAGS | os.O_NOFOLLOW, dir_fd=self.open_folders.enter(folder))
        except OSError as error:
            if error.errno in GONE_ERRNOS:
                return None
            raise
        found = os.fstat(file)
        if (found.st_ino, found.st_size) != (entry.copy, key[3]) or found.st_nlink >= _MAX_LINKS:
            os.close(file)
            return None
        return file, entry

    def _candidates(self, folder: int | None, name: str, key: Key) -> Iterator[tuple[int, str]]:
        if folder is not None and name in self.index.entries[folder]:
            yield folder, name
        if self._locations is None:
            self._locations = {
                entry.key[0]: (where, called) for where, called, entry in self.index.walk() if not entry.is_folder
            }
        if key[0] in self._locations:
            yield self._locations[key[0]]


@dataclass
class PassCounts:
    """Numbers of entries and bytes that a pass changed."""

    entries: int = 0
    bytes: int = 0


class _LinkedEntry(NamedTuple):
    """The first name of an inode with several names, in this pass."""

    entry: IndexEntry
    folder: int
    name: str


class _Visit(NamedTuple):
    """A folder to walk: its parent in the new index, its own numbers in the old and the previous index."""

    parent: int
    name: str
    old: int | None
    previous: int | None
    changed: bool


class _WalkedFolder(NamedTuple):
    """A folder that is walked: its number in the new index, in the old index, and in that of an earlier snapshot."""

    folder: int
    old: int | None
    previous: int | None


class Mirror:
    """One pass over a tree. All folders are open descriptors.

    `staging` is an empty folder on the target's filesystem, in which every entry is created before it is renamed to its
    place: there it inherits nothing from its parent, and it is never visible incomplete. `previous` are copies of an
    earlier state, which may be linked. `hidden` is a name in the root of the target that does not belong to the copy.
    `live`: processes may write to the source now; `quiet`: no process has a file of the source open or mapped. Two
    changes within `tick_ns` may have the same ctime. With `limits`, a larger tree raises TreeTooLargeError.
    """

    def __init__(
        self,
        source: int,
        target: int,
        staging: int,
        entry_copier: EntryCopier,
        interrupt: Interrupt,
        *,
        previous: CopyIndex | None,
        live: bool,
        quiet: bool,
        handled: Callable[[int], None],
        hidden: str = "",
        tick_ns: int = TICK_NS,
        limits: Limits | None = None,
    ) -> None:
        self._source, self._target, self._staging = source, target, staging
        self._entry_copier, self._interrupt, self._previous = entry_copier, interrupt, previous
        self._live, self._quiet, self._hidden, self._handled = live, quiet, hidden, handled
        self._tick_ns, self._counter = tick_ns, EntryCounter(limits)
        self._device = os.fstat(source).st_dev
        self._tracks_mapped_writes = entry_copier.tracks_mapped_writes(source)
        self._linked_entries: dict[int, _LinkedEntry] = {}
        self._copy_owners: dict[int, int] | None = None
        self._gone: list[tuple[int, str]] = []
        self._touched: set[int] = set()
        self.moved = PassCounts()

    def run(self, index: Index) -> Index:
        """Make the target equal to the source and return the new index; `index` describes the target before.

        If this raises, the target matches neither the old nor a new index.
        """
        remove_entry(self._staging, _STAGED_NAME, self._interrupt)
        self._own = CopyIndex(index, self._target, self._device)
        self._old, self._fresh = index, Index(self._device)
        folder_tree = self._fresh.folder_tree
        self._link_folders = OpenFolders(self._target, folder_tree)
        with OpenFolders(self._source, folder_tree) as source, OpenFolders(self._target, folder_tree) as target:
            with self._own.open_folders, self._link_folders:
                self._walk(source, target)
            self._remove_gone(target)
            self._set_times(target)
        return self._fresh

    def _walk(self, source: OpenFolders, target: OpenFolders) -> None:
        fresh, previous = self._fresh, self._previous
        fresh.root = self._old.root
        if not _is_same(fresh.root, key_of(os.fstat(self._source))):
            fresh.root = self._apply_attributes(ROOT, self._source, self._target)
        waiting = self._scan(_WalkedFolder(ROOT, ROOT, ROOT if previous else None), self._source, self._target)
        while waiting:
            visit = waiting.pop()
            folder = fresh.add_folder(visit.parent, visit.name)
            self._counter.folder(fresh.folder_tree.depths[folder])
            try:
                here = source.enter(folder)
            except OSError as error:
                if error.errno not in GONE_ERRNOS:
                    raise
                fresh.drop_last_folder()
                self._gone.append((visit.parent, visit.name))
                continue
            there = target.enter(folder)
            if visit.changed:
                fresh.entries[visit.parent][visit.name] = self._apply_attributes(folder, here, there)
            waiting += self._scan(_WalkedFolder(folder, visit.old, visit.previous), here, there)

    def _apply_attributes(self, folder: int, here: int, there: int) -> IndexEntry:
        """Copy the attributes of a folder; its times are set at the end of the pass."""
        checked_ns = time.time_ns()
        status = os.fstat(here)
        os.fchown(there, status.st_uid, status.st_gid)
        opaque = match_xattrs(here, there).get(OPAQUE_XATTR) == b"y"
        os.fchmod(there, stat.S_IMODE(status.st_mode))
        self._touched.add(folder)
        self.moved.entries += 1
        settled = self._is_past(status, checked_ns)
        return IndexEntry(key_of(status), os.fstat(there).st_ino, settled, shared=False, opaque=opaque)

    def _scan(self, place: _WalkedFolder, here: int, there: int) -> list[_Visit]:
        """Copy what has changed in one folder; returns the folders in it that must be walked."""
        old = self._old.entries[place.old] if place.old is not None else {}
        fresh = self._fresh.entries[place.folder]
        earlier = self._previous.index if self._previous else None
        found: list[_Visit] = []
        check, device, hidden = self._interrupt.check, self._device, self._hidden if place.folder == ROOT else ""
        count = self._counter.entry
        with os.scandir(here) as entries:
            for item in entries:
                check()
                name = item.name
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if status.st_dev != device or name == hidden:
                    continue
                count(name)
                known, key = old.get(name), key_of(status)
                same = _is_same(known, key)
                if stat.S_ISDIR(status.st_mode):
                    if known is None or not known.is_folder:
                        self._make_folder(place, name, there, known)
                        known = None
                    fresh[name] = known or _UNKNOWN
                    found.append(
                        _Visit(
                            parent=place.folder,
                            name=name,
                            old=self._old.subfolder(place.old, name) if known else None,
                            previous=earlier.subfolder(place.previous, name) if earlier else None,
                            changed=not same,
                        )
                    )
                elif known and same and self._agrees(status, known, place, name):
                    fresh[name] = known
                elif (
                    known is None
                    and status.st_nlink > 1
                    and (linked := self._link_in_place(place, name, there, status, key))
                ):
                    fresh[name] = linked
                elif copied := self._copy_entry(place, name, here, there, known):
                    fresh[name] = copied
        self._gone += [(place.folder, name) for name in old.keys() - fresh.keys()]
        return found

    def _agrees(self, status: os.stat_result, known: IndexEntry, place: _WalkedFolder, name: str) -> bool:
        """Whether all names of the inode so far have the same copy."""
        if status.st_nlink == 1 or is_whiteout(status):
            return True
        linked = self._linked_entries.setdefault(status.st_ino, _LinkedEntry(known, place.folder, name))
        return linked.entry.copy == known.copy and linked.entry.key == known.key

    def _make_folder(self, place: _WalkedFolder, name: str, there: int, known: IndexEntry | None) -> None:
        os.mkdir(_STAGED_NAME, 0o700, dir_fd=self._staging)
        self._put(place, name, there, known)

    def _copy_entry(
        self, place: _WalkedFolder, name: str, here: int, there: int, known: IndexEntry | None
    ) -> IndexEntry | None:
        """Copy one entry that is not a folder; None if it no longer exists or is now a folder."""
        try:
            handle = os.open(name, _HANDLE_FLAGS, dir_fd=here)
        except OSError as error:
            if error.errno in GONE_ERRNOS:
                return None
            raise
        try:
            checked_ns = time.time_ns()
            status = os.fstat(handle)
            if stat.S_ISDIR(status.st_mode):
                return None
            entry = self._stage(place, name, handle, status, checked_ns)
        finally:
            os.close(handle)
        self._put(place, name, there, known)
        if status.st_nlink > 1 and not is_whiteout(status):
            self._linked_entries[status.st_ino] = _LinkedEntry(entry, place.folder, name)
        self.moved.entries += 1
        return entry

    def _stage(
        self, place: _WalkedFolder, name: str, handle: int, status: os.stat_result, checked_ns: int
    ) -> IndexEntry:
        """Create the entry in the staging folder: as a link if an equal copy exists, otherwise as a new copy."""
        key, names = key_of(status), status.st_nlink
        size = status.st_blocks * _BLOCK_BYTES
        linked = self._linked_entries.get(status.st_ino)
        if linked and linked.entry.key == key and self._link_staged(linked):
            return linked.entry
        if entry := self._own.link(place.old, name, key, 0, self._staging):
            return entry
        if self._previous and (entry := self._previous.link(place.previous, name, key, names, self._staging)):
            if is_whiteout(status) or self._is_free(entry.copy, status.st_ino):
                self._handled(size)
                return entry._replace(shared=True)
            os.unlink(_STAGED_NAME, dir_fd=self._staging)
        if not stat.S_ISREG(status.st_mode):
            self._entry_copier.special(handle, status, self._staging, _STAGED_NAME)
            return self._entry(key, settled=self._is_past(status, checked_ns), shared=False)
        # Opened through the checked handle: the name may now be a device, which must not be opened.
        file = os.open(f"/proc/self/fd/{handle}", _READ_FLAGS)
        try:
            return self._file(place, name, file, status, checked_ns)
        finally:
            os.close(file)

    def _link_staged(self, linked: _LinkedEntry) -> bool:
        try:
            at = self._link_folders.enter(linked.folder)
            os.link(linked.name, _STAGED_NAME, src_dir_fd=at, dst_dir_fd=self._staging, follow_symlinks=False)
        except OSError as error:
            if error.errno in _CANNOT_LINK:
                return False
            raise
        return True

    def _link_in_place(
        self, place: _WalkedFolder, name: str, there: int, status: os.stat_result, key: Key
    ) -> IndexEntry | None:
        """Link a new name of an inode that was copied before in this pass, without the staging folder.

        That is half the work, and a tree may have hundreds of thousands of names for one inode.
        """
        linked = self._linked_entries.get(status.st_ino)
        if linked is None or linked.entry.key != key:
            return None
        try:
            at = self._link_folders.enter(linked.folder)
            os.link(linked.name, name, src_dir_fd=at, dst_dir_fd=there, follow_symlinks=False)
        except OSError as error:
            if error.errno in _CANNOT_LINK or error.errno == errno.EEXIST:
                return None
            raise
        self._touched.add(place.folder)
        self.moved.entries += 1
        return linked.entry

    def _file(self, place: _WalkedFolder, name: str, file: int, status: os.stat_result, checked_ns: int) -> IndexEntry:
        key, size = key_of(status), status.st_blocks * _BLOCK_BYTES
        # The order stat, write back, copy misses no change; see EntryCopier.write_back. Sharing extents needs no write
        # back: the filesystem locks the file and writes it out first.
        written = self._live and not self._entry_copier.clones and self._entry_copier.write_back(file)
        settled = self._is_past(status, checked_ns) and (self._quiet or (written and self._tracks_mapped_writes))
        if entry := self._same_as_before(place, name, file, key):
            self._handled(size)
            return entry._replace(key=key, settled=settled, shared=True)
        write_back = self._live and not written
        cloned, copied_written = self._entry_copier.file(
            file, status, self._staging, _STAGED_NAME, write_back=write_back
        )
        if cloned:
            self._handled(size)
        else:
            self.moved.bytes += size
        if cloned or (copied_written and self._tracks_mapped_writes):
            settled = settled or self._is_past(status, checked_ns)
        return self._entry(key, settled=settled, shared=cloned)

    def _same_as_before(self, place: _WalkedFolder, name: str, file: int, key: Key) -> IndexEntry | None:
        """Link an earlier copy if its content is equal although the inode or ctime differs."""
        found = self._previous.open_like(place.previous, name, key) if self._previous else None
        if found is None:
            return None
        other, entry = found
        try:
            if not (self._is_free(entry.copy, key[0]) and self._entry_copier.same_file(file, other, key[3])):
                return None
            # Link the open file that was compared; its name may be another file now.
            os.link(f"/proc/self/fd/{other}", _STAGED_NAME, dst_dir_fd=self._staging, follow_symlinks=True)
        except OSError as error:
            if error.errno in _CANNOT_LINK:
                return None
            raise
        finally:
            os.close(other)
        return entry

    def _is_free(self, copy: int, inode: int) -> bool:
        """Whether no other inode of the source uses this earlier copy: two equal files must not become one."""
        if self._copy_owners is None:
            self._copy_owners = {entry.copy: entry.key[0] for _, _, entry in self._old.walk()}
        return self._copy_owners.setdefault(copy, inode) == inode

    def _entry(self, key: Key, *, settled: bool, shared: bool) -> IndexEntry:
        made = os.stat(_STAGED_NAME, dir_fd=self._staging, follow_symlinks=False)
        return IndexEntry(key, made.st_ino, settled, shared)

    def _put(self, place: _WalkedFolder, name: str, there: int, known: IndexEntry | None) -> None:
        """Move the staged entry to its place."""
        if known is not None:
            # rename(2) does nothing if both names are links of the same inode.
            remove_entry(there, name, self._interrupt)
        os.rename(_STAGED_NAME, name, src_dir_fd=self._staging, dst_dir_fd=there)
        self._touched.add(place.folder)

    def _is_past(self, status: os.stat_result, checked_ns: int) -> bool:
        """Whether every later change will have a later ctime."""
        return is_whiteout(status) or status.st_ctime_ns < checked_ns - self._tick_ns

    def _remove_gone(self, target: OpenFolders) -> None:
        """Remove entries that the source no longer has; at the end, so that renamed files could be linked from them."""
        for folder, name in self._gone:
            try:
                there = target.enter(folder)
            except OSError as error:
                if error.errno in GONE_ERRNOS:  # a parent folder was removed before
                    continue
                raise
            remove_entry(there, name, self._interrupt)
            self._touched.add(folder)
            self.moved.entries += 1

    def _set_times(self, target: OpenFolders) -> None:
        folder_tree = self._fresh.folder_tree
        # In the order of the walk, so that few folders are opened twice.
        for folder in sorted(self._touched):
            parent, name = folder_tree.parents[folder], folder_tree.names[folder]
            entry = self._fresh.root if folder == ROOT else self._fresh.entry(parent, name)
            if entry is not None:
                os.utime(target.enter(folder), ns=(entry.key[2], entry.key[2]))


def _is_same(known: IndexEntry | None, key: Key) -> bool:
    return known is not None and known.settled and known.key == key
