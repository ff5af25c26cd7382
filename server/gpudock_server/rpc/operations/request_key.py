"""The idempotency key of a mutation: its `request_id`, and a digest of the rest of the request."""

from __future__ import annotations

import hashlib
from typing import Protocol

from google.protobuf.message import Message

from gpudock_server.core.operations.engine import RequestKey
from gpudock_server.rpc.validation.fields import MutationRequest

# Not in the digest: the id itself, and credentials, of which not even a digest may be stored.
_IGNORED_FIELDS = ("request_id", "registry_auth")


class OperationRequest(MutationRequest, Protocol):
    """A request that starts an operation, or only plans it."""

    @property
    def validate_only(self) -> bool:
        """Whether to return the plan only."""
        ...


def request_key(request: MutationRequest) -> RequestKey | None:
    """The key of a call; None if the request has no id.

    A call with `validate_only` has no key: it records nothing that a repeated call could return.
    """
    if not isinstance(request, Message):
        raise TypeError(f"{request!r} is not a message")
    if not request.request_id or getattr(request, "validate_only", False):
        return None
    return RequestKey(id=request.request_id.lower(), digest=_digest(request))


def _digest(request: Message) -> str:
    # The contract has one service in a file, and names the request of each method after it.
    (service,) = request.DESCRIPTOR.file.services_by_name.values()
    method = f"/{service.full_name}/{request.DESCRIPTOR.name.removesuffix('Request')}"
    rest = type(request)()
    rest.CopyFrom(request)
    for field in _IGNORED_FIELDS:
        if field in rest.DESCRIPTOR.fields_by_name:
            rest.ClearField(field)
    content = rest.SerializeToString(deterministic=True)
    return hashlib.sha256(method.encode() + b"\0" + content).hexdigest()
