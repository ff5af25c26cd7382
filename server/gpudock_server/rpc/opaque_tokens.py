"""Page and resume tokens: a position, and a digest that ties it to one list or watch.

The digest is not a secret and protects nothing. It detects a token that was truncated, made up or taken from another
list, and a filter that changed between two pages.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

_DIGEST_BYTES = 8


def encode_token(scope: bytes, resume: str) -> str:
    """A token for the position `resume` of the list that `scope` identifies."""
    return base64.urlsafe_b64encode(_digest(scope, resume.encode()) + resume.encode()).decode().rstrip("=")


def decode_token(scope: bytes, token: str) -> str | None:
    """The position of `token`; None if the token does not belong to the list that `scope` identifies."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        digest, resume = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        return resume.decode() if digest == _digest(scope, resume) else None
    except (binascii.Error, ValueError):
        return None


def _digest(scope: bytes, resume: bytes) -> bytes:
    # The scope is hashed on its own, so that moving a byte between scope and position changes the digest.
    return hashlib.sha256(hashlib.sha256(scope).digest() + resume).digest()[:_DIGEST_BYTES]
