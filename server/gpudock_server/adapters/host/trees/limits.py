"""How large a tree may be of which an index is kept."""

from __future__ import annotations

from dataclasses import dataclass

# Of one entry in memory: two indices (the one before and the new one) and the places of the copies.
_ENTRY_BYTES = 2048
_NAME_COPIES = 4
_BASE_BYTES = 512 << 20
# Paths of one-character names are no longer than PATH_MAX at this depth; beyond it, no program reaches a file by path.
MAX_DEPTH = 4096
MAX_NAME_BYTES = 128 << 20
DEFAULT_MAX_ENTRIES = 1_000_000


class TreeTooLargeError(Exception):
    """A tree exceeds the limits; the text says which one, and its value."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most entries, folders in folders, and characters of all names together."""

    entries: int = DEFAULT_MAX_ENTRIES
    depth: int = MAX_DEPTH
    name_characters: int = MAX_NAME_BYTES

    @property
    def memory_bytes(self) -> int:
        """The address space that is enough to mirror a tree within these limits."""
        return _BASE_BYTES + self.entries * _ENTRY_BYTES + self.name_characters * _NAME_COPIES


class EntryCounter:
    """Counts the entries of a tree against limits; without limits it only counts."""

    def __init__(self, limits: Limits | None) -> None:
        self._limits = limits
        self._most_entries = limits.entries if limits else None
        self.entries = 0
        self.name_characters = 0

    def folder(self, depth: int) -> None:
        """Check the depth of a folder below the root. Raises TreeTooLargeError."""
        if self._limits and depth > self._limits.depth:
            raise TreeTooLargeError(f"folders are nested more than {self._limits.depth} deep")

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
