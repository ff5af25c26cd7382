"""Authenticates the caller of each call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc.aio
import structlog
from typing_extensions import override

from gpudock_server.errors import Unauthenticated
from gpudock_server.logs import truncate
from gpudock_server.rpc.middleware.bearer_tokens import TokenFile
from gpudock_server.rpc.middleware.interceptor import Call, Context, Interceptor

# Health needs no authentication: load balancers have no credentials, and it reveals no more than an open port.
HEALTH_METHOD_PREFIX = "/grpc.health.v1.Health/"
# Requests of unauthenticated callers that are read at the same time, and how long each may take to arrive.
_ANONYMOUS_READS = 16
_ANONYMOUS_READ_SECONDS = 5.0
_BEARER = "bearer "
# Properties of a TLS peer that name it, the most specific first. They exist only if the certificate was verified.
_CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")

_log = structlog.stdlib.get_logger("gpudock.rpc")


class CallerKind(StrEnum):
    """How a caller was authenticated. UNIX: by the permission to write to the daemon's socket."""

    ANONYMOUS = "nobody"
    UNIX = "unix"
    TOKEN = "token"  # noqa: S105 - a kind, not a token
    CERTIFICATE = "certificate"


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a call. `name` comes from the token file or the certificate."""

    kind: CallerKind
    name: str = ""

    def log_fields(self) -> dict[str, str]:
        """The caller as fields of a log line.

        Kind and name are two fields, because the log would mask the second half of `token:ci` as a secret.
        """
        return {"caller_kind": self.kind.value, "caller": truncate(self.name)}


ANONYMOUS = Caller(CallerKind.ANONYMOUS)
UNIX = Caller(CallerKind.UNIX)

_caller: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def caller() -> Caller:
    """The caller of the current call; ANONYMOUS outside of a call, and for a call without authentication."""
    return _caller.get()


class IdentityInterceptor(Interceptor):
    """Sets `caller()`, or raises Unauthenticated."""

    def __init__(self, tokens: TokenFile | None) -> None:
        self._tokens = tokens
        self._anonymous_reads = asyncio.Semaphore(_ANONYMOUS_READS)

    @override
    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        if call.method.startswith(HEALTH_METHOD_PREFIX):
            try:
                _caller.set(self._identify(call.context))
            except Unauthenticated:
                call.request = self._first_request_in_time(aiter(call.request), call.context)
        else:
            try:
                identified = self._identify(call.context)
            except Unauthenticated as error:
                _log.warning("authentication failed", peer=call.context.peer(), reason=error.message)
                raise
            # Not reset: the task and its context belong to this call alone.
            _caller.set(identified)
            structlog.contextvars.bind_contextvars(**identified.log_fields())
        yield

    async def _first_request_in_time(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Read the request of an unauthenticated caller: few at the same time, each within a time limit."""
        async with self._anonymous_reads:
            try:
                async with asyncio.timeout(_ANONYMOUS_READ_SECONDS):
                    first = await anext(requests, None)
            except TimeoutError:
                await context.abort(
                    grpc.StatusCode.DEADLINE_EXCEEDED, f"no request received within {_ANONYMOUS_READ_SECONDS:g} s"
                )
        if first is not None:
            yield first

    def _identify(self, context: Context) -> Caller:
        if context.peer().startswith("unix:"):
            return UNIX
        credentials = _authorization(context)
        if credentials:
            return self._authenticate_token(credentials)
        certificate = _certificate_name(context.auth_context())
        if certificate:
            return Caller(CallerKind.CERTIFICATE, certificate)
        raise Unauthenticated(
            "authentication required: send the metadata `authorization` with the scheme `Bearer` and a token, or a"
            " client certificate"
        )

    def _authenticate_token(self, credentials: str) -> Caller:
        if not credentials.lower().startswith(_BEARER):
            raise Unauthenticated("the metadata `authorization` must have the scheme `Bearer` and a token")
        name = self._tokens.name_of(credentials[len(_BEARER) :].strip()) if self._tokens else None
        if name is None:
            raise Unauthenticated("the token is not valid")
        return Caller(CallerKind.TOKEN, name)


def _authorization(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode(errors="replace")
    return ""


def _certificate_name(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    for key in _CERTIFICATE_NAMES:
        for name in auth_context.get(key, ()):
            return name.decode(errors="replace")
    return ""
