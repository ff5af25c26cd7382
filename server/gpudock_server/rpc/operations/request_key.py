"""The idempotency key of a mutation: its `request_id`, and a digest of the rest of the request."""

from __future__ import annotations

import hashlib
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from gpudock_server.core.operations.engine import RequestKey

# Not in the digest: the id itself, and credentials, of which not even a digest may be stored.
_IGNORED_FIELDS = ("request_id", "registry_auth")

M = TypeVar("M", bound=Message)


class MutationRequest(Protocol):
    """The request of a mutation."""

    @property
    def request_id(self) -> str:
        """The id that the caller chose; empty for none."""
        ...


def request_key(method: str, request: MutationRequest) -> RequestKey | None:
    """The key of a call of `method` (`/package.Service/Method`); None if the request has no id.

    A call with `validate_only` has no key: it records nothing that a repeated call could return.
    """
    if not isinstance(request, Message):
        raise TypeError(f"{request!r} is not a message")
    if not request.request_id or getattr(request, "validate_only", False):
        return None
    return RequestKey(id=request.request_id.lower(), digest=_digest(method, request))


def _digest(method: str, request: Message) -> str:
    rest = type(request)()
    rest.CopyFrom(request)
    for field in _IGNORED_FIELDS:
        if field in rest.DESCRIPTOR.fields_by_name:
            rest.ClearField(field)
    content = rest.SerializeToString(deterministic=True)
    return hashlib.sha256(method.encode() + b"\0" + content).hexdigest()
