"""Page and resume tokens: positions in lists and watches, as text that callers return unread.

The store encodes its positions. rpc ties each of them to one list or watch with a digest. The digest is not a secret
and protects nothing: it detects a token that was truncated, made up or taken from another list, and a filter that
changed between two pages.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

_DIGEST_BYTES = 8
# The first revision of a key is 2: revision 1 is an empty etcd.
_MIN_REVISION = 2
_MAX_REVISION = 2**63 - 1


def encode_token(scope: bytes, position: str) -> str:
    """A token for a position of the list or watch that `scope` identifies."""
    return _encode(_digest(scope, position.encode()) + position.encode())


def decode_token(scope: bytes, token: str) -> str | None:
    """The position of `token`; None if the token does not belong to the list or watch that `scope` identifies."""
    try:
        raw = _decode(token)
        digest, position = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        return position.decode() if digest == _digest(scope, position) else None
    except ValueError:
        return None


def encode_position(*phase: str, revision: int, key: bytes) -> str:
    """A position of the store: a revision, the last key that was read, and for a watch its phase."""
    return _encode(json.dumps([*phase, revision, key.decode("ascii")]).encode())


def decode_position(position: str) -> tuple[list[Any], int, bytes]:
    """The phase, if any, the revision and the key of a position. Raises ValueError if it is none."""
    try:
        *phase, revision, key = json.loads(_decode(position))
        encoded_key = key.encode("ascii")
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError("is not a position") from error
    if type(revision) is not int or not _MIN_REVISION <= revision <= _MAX_REVISION:
        raise ValueError(f"{revision} is not a revision")
    return phase, revision, encoded_key


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _digest(scope: bytes, position: bytes) -> bytes:
    # The scope is hashed on its own, so that moving a byte between scope and position changes the digest.
    return hashlib.sha256(hashlib.sha256(scope).digest() + position).digest()[:_DIGEST_BYTES]
