"""Page tokens: where a list goes on, and a digest that ties it to the list that it came from.

The digest is not a secret and guards nothing. It catches what a caller has cut off, mixed up or made up, and a filter
that changed from one page to the next, which would give a list of nothing in particular.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

_DIGEST_BYTES = 8


def encode_token(scope: bytes, resume: str) -> str:
    """A token that goes on at `resume` in the list that `scope` names."""
    return base64.urlsafe_b64encode(_digest(scope, resume.encode()) + resume.encode()).decode().rstrip("=")


def decode_token(scope: bytes, token: str) -> str | None:
    """Where `token` goes on; None if it is none of this list."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        digest, resume = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        return resume.decode() if digest == _digest(scope, resume) else None
    except (binascii.Error, ValueError):
        return None


def _digest(scope: bytes, resume: bytes) -> bytes:
    # Each part in its own digest, so that no byte of one can be taken for one of the other.
    return hashlib.sha256(hashlib.sha256(scope).digest() + resume).digest()[:_DIGEST_BYTES]
