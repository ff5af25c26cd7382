"""What makes two calls the same call: the caller's `request_id`, and a digest of everything else in the request."""

from __future__ import annotations

import hashlib
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from gpudock_server.core.operations.engine import RequestKey

# Not part of what has to agree: the id itself, and credentials, of which not even a digest is to be stored.
_IGNORED_FIELDS = ("request_id", "registry_auth")

M = TypeVar("M", bound=Message)


class MutationRequest(Protocol):
    """A request of a mutation."""

    @property
    def request_id(self) -> str:
        """The id that the caller gave; empty for none."""
        ...


def request_key(method: str, request: MutationRequest) -> RequestKey | None:
    """The key of a call of `method` (`/package.Service/Method`); None where the caller gave no id.

    A call with `validate_only` leaves nothing behind that a second one could find, so it has no key.
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
