"""Collects the violations of a request, field by field."""

from __future__ import annotations

from gpudock_server.errors import FieldViolation, InvalidArgument

# Keys are chosen by the caller; this much of one is enough to find it.
_KEY_CHARACTERS = 60


class Violations:
    """The violations found so far, and the path of a part of the request.

    `at` returns an object for a deeper part. All of them add to the same list.
    """

    def __init__(self, path: str = "", found: list[FieldViolation] | None = None) -> None:
        self._path = path
        self._found: list[FieldViolation] = [] if found is None else found

    def at(self, field: str, key: int | str | None = None) -> Violations:
        """The same list for the part `field`, or for one entry of it: `ports[2]`, `env["PATH"]`."""
        return Violations(self._join(field, key), self._found)

    def add(self, field: str, description: str, key: int | str | None = None) -> None:
        """Add a violation of `field`, or of its entry `key`. An empty `field` is the part itself."""
        self._found.append(FieldViolation(self._join(field, key), description))

    @property
    def found(self) -> tuple[FieldViolation, ...]:
        """All violations."""
        return tuple(self._found)

    @property
    def any(self) -> bool:
        """Whether there are violations."""
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Raise InvalidArgument with all violations, if there are any."""
        if self._found:
            raise InvalidArgument(tuple(self._found))

    def _join(self, field: str, key: int | str | None) -> str:
        if isinstance(key, str):
            shown = key if len(key) <= _KEY_CHARACTERS else key[:_KEY_CHARACTERS] + "…"
            field = f'{field}["{shown}"]'
        elif key is not None:
            field = f"{field}[{key}]"
        return ".".join(part for part in (self._path, field) if part)
