"""The syntax of names. Names are never parsed."""

from __future__ import annotations

import re

NAME_PATTERN = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
_NAME = re.compile(NAME_PATTERN, re.ASCII)


def is_name(text: str) -> bool:
    """Whether `text` can name a container, a volume or a node."""
    # fullmatch and not match: `$` alone accepts a trailing newline.
    return _NAME.fullmatch(text) is not None


def engine_container_name(container: str, operation_id: str) -> str:
    """The engine's name for what an operation makes: unique to it, so that making it twice is making it once."""
    return f"gpudock-{container}-{operation_id[-8:]}"
