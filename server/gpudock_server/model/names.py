"""What a name may be. Nothing is ever parsed out of one."""

from __future__ import annotations

import re

NAME_PATTERN = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
_NAME = re.compile(NAME_PATTERN, re.ASCII)


def is_name(text: str) -> bool:
    """Whether `text` can name a container, a volume or a node."""
    # fullmatch and not match: `$` alone would let a trailing newline through.
    return _NAME.fullmatch(text) is not None
