"""What may name an image: the grammar of https://pkg.go.dev/github.com/distribution/reference, and image ids."""

from __future__ import annotations

import re

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]{{1,5}})?"
_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"
_REFERENCE = re.compile(rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::{_TAG})?(?:@{_DIGEST})?", re.ASCII)
# An id in full, or as much of it as tells it from others. Without the prefix a short one is a repository to the
# grammar above, and the engine tries both.
_ID = re.compile(r"(?:sha256:)?[0-9a-f]{4,64}", re.ASCII)


def is_image_reference(text: str) -> bool:
    """Whether `text` (of a bounded length) can name an image."""
    return _REFERENCE.fullmatch(text) is not None or _ID.fullmatch(text) is not None
