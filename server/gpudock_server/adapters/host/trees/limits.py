"""Limits of the size of trees that are indexed."""

from __future__ import annotations

from dataclasses import dataclass

# Memory of one entry: in two indexes (the previous and the new one) and in the locations of the copies.
_ENTRY_BYTES = 2048
_NAME_COPIES = 4
_BASE_BYTES = 512 << 20
# At this depth even paths of one-character names exceed PATH_MAX, so no program can use a path beyond it.
MAX_DEPTH = 4096
MAX_NAME_BYTES = 128 << 20
DEFAULT_MAX_ENTRIES = 1_000_000


class TreeTooLargeError(Exception):
    """A tree exceeds the limits; the message says which one, and its value."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum number of entries, depth of folders, and characters of all names together."""

    entries: int = DEFAULT_MAX_ENTRIES
    depth: int = MAX_DEPTH
    name_characters: int = MAX_NAME_BYTES

    @property
    def memory_bytes(self) -> int:
        """Return the address space that is enough to mirror a tree within these limits."""
        return _BASE_BYTES + self.entries * _ENTRY_BYTES + self.name_characters * _NAME_COPIES


class EntryCounter:
    """Counts the entries of a tree against limits; without limits it only counts."""

    def __init__(self, limits: Limits | None) -> None:
        self._limits = limits
        self.entries = 0
        self.name_characters = 0

    def folder(self, depth: int) -> None:
        """Check the depth of a folder. Raises TreeTooLargeError."""
        if self._limits and depth > self._limits.depth:
            raise TreeTooLargeError(f"folders are nested deeper than {self._limits.depth}")

    def entry(self, name: str) -> None:
        """Count one entry. Raises TreeTooLargeError."""
        self.entries += 1
        self.name_characters += len(name)
        if self._limits is None:
            return
        if self.entries > self._limits.entries:
            raise TreeTooLargeError(f"there are more than {self._limits.entries} files and folders")
        if self.name_characters > self._limits.name_characters:
            raise TreeTooLargeError(f"file names take more than {self._limits.name_characters} characters together")
