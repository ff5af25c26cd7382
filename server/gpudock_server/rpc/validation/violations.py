"""Collects what is wrong with a request, field by field."""

from __future__ import annotations

from gpudock_server.errors import FieldViolation, InvalidArgument

# Of a key that the caller chose, as much as a reader needs to find it.
_KEY_CHARACTERS = 60


class Violations:
    """What is wrong so far, and where in the request its holder looks.

    `at` gives one for a part of the request; all of them add to the same list.
    """

    def __init__(self, path: str = "", found: list[FieldViolation] | None = None) -> None:
        self._path = path
        self._found: list[FieldViolation] = [] if found is None else found

    def at(self, field: str, key: int | str | None = None) -> Violations:
        """The same list, seen from `field`, or from one entry of it: `ports[2]`, `env["PATH"]`."""
        return Violations(self._join(field, key), self._found)

    def add(self, field: str, description: str, key: int | str | None = None) -> None:
        """Note that `field` (or its entry `key`; empty: the part itself) breaks the rule that `description` states."""
        self._found.append(FieldViolation(self._join(field, key), description))

    @property
    def found(self) -> tuple[FieldViolation, ...]:
        """All of it."""
        return tuple(self._found)

    @property
    def any(self) -> bool:
        """Whether something is wrong."""
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Raise InvalidArgument with all of it, if there is any."""
        if self._found:
            raise InvalidArgument(tuple(self._found))

    def _join(self, field: str, key: int | str | None) -> str:
        if isinstance(key, str):
            shown = key if len(key) <= _KEY_CHARACTERS else key[:_KEY_CHARACTERS] + "…"
            field = f'{field}["{shown}"]'
        elif key is not None:
            field = f"{field}[{key}]"
        return ".".join(part for part in (self._path, field) if part)
