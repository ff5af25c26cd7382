"""Errors about a request itself: its fields, its caller, its tokens and limits."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from gpudock_server.errors.base import Code, FieldViolation, GpudockError, metadata_text


@dataclass(eq=False)
class InvalidArgument(GpudockError):
    """The request breaks rules of the contract; `violations` has all of them."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"
    violations: tuple[FieldViolation, ...]

    @property
    @override
    def message(self) -> str:
        return "; ".join(f"{violation.field}: {violation.description}" for violation in self.violations)

    @property
    @override
    def metadata(self) -> dict[str, str]:
        return {"fields": metadata_text([violation.field for violation in self.violations])}


@dataclass(eq=False)
class RequestIdReused(GpudockError):
    """An earlier call with other arguments had the same request id."""

    code = Code.INVALID_ARGUMENT
    reason = "REQUEST_ID_REUSED"
    template = "request_id {request_id} was already used with other arguments; use a new one"
    request_id: str


@dataclass(eq=False)
class Unauthenticated(GpudockError):
    """The caller has no valid credentials."""

    code = Code.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"
    detail: str

    @property
    @override
    def message(self) -> str:
        return self.detail


@dataclass(eq=False)
class LimitForbidden(GpudockError):
    """A limit of a container's spec is above the maximum that a setting of the node allows."""

    code = Code.PERMISSION_DENIED
    reason = "LIMIT_FORBIDDEN"
    template = "{field} is {requested}; this node allows at most {maximum} for one container (setting {setting})"
    field: str
    requested: int
    maximum: int
    setting: str


@dataclass(eq=False)
class HealthWatchLimit(GpudockError):
    """Unauthenticated callers have the maximum number of health watches open."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "HEALTH_WATCH_LIMIT"
    template = (
        "unauthenticated callers have {limit} health watches open, which is the limit; send a token, use the unix"
        " socket, or call Check"
    )
    limit: int


@dataclass(eq=False)
class ResumeTokenExpired(GpudockError):
    """The store has compacted the history that the token refers to."""

    code = Code.OUT_OF_RANGE
    reason = "RESUME_TOKEN_EXPIRED"
    template = "the page or resume token has expired; start again without it"
    token: str
