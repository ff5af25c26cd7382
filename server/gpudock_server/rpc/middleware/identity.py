"""Who calls: established once for each call, before anything else looks at it."""

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

# Load balancers and systemd's watchdogs have no identity; health tells them nothing that a closed port would not.
HEALTH_METHOD_PREFIX = "/grpc.health.v1.Health/"
# Requests of callers without an identity that are in memory at one time, and how long each may take to arrive.
_ANONYMOUS_READS = 16
_ANONYMOUS_READ_SECONDS = 5.0
_BEARER = "bearer "
# What TLS calls the peer, the most specific first. These are there only if the certificate was verified.
_CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")

_log = structlog.stdlib.get_logger("gpudock.rpc")


class CallerKind(StrEnum):
    """How a caller was recognised. UNIX: by the right to write to the daemon's socket."""

    ANONYMOUS = "nobody"
    UNIX = "unix"
    TOKEN = "token"  # noqa: S105 - a kind, not a token
    CERTIFICATE = "certificate"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `name` is what the token file or the certificate says."""

    kind: CallerKind
    name: str = ""

    def log_fields(self) -> dict[str, str]:
        """How a log line says who called.

        In two fields: of one text, `token:ci`, the log would take the second half for a secret and hide it.
        """
        return {"caller_kind": self.kind.value, "caller": truncate(self.name)}


ANONYMOUS = Caller(CallerKind.ANONYMOUS)
UNIX = Caller(CallerKind.UNIX)

_caller: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def caller() -> Caller:
    """Who made the call that this task works for; ANONYMOUS outside of a call, and in one that needs no identity."""
    return _caller.get()


class IdentityInterceptor(Interceptor):
    """Sets `caller()`, or ends the call with Unauthenticated. Runs inside ErrorInterceptor."""

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
                found = self._identify(call.context)
            except Unauthenticated as error:
                _log.warning("call refused", peer=call.context.peer(), reason=error.message)
                raise
            # Never reset: the task, and its context with it, is this call's own.
            _caller.set(found)
            structlog.contextvars.bind_contextvars(**found.log_fields())
        yield

    async def _first_request_in_time(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """The requests of a caller without an identity: few are read at one time, and none is waited for long."""
        async with self._anonymous_reads:
            try:
                async with asyncio.timeout(_ANONYMOUS_READ_SECONDS):
                    first = await anext(requests, None)
            except TimeoutError:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not come in time")
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
            "this address takes no anonymous calls; send the metadata `authorization` with the scheme `Bearer` and a"
            " token"
        )

    def _authenticate_token(self, credentials: str) -> Caller:
        if not credentials.lower().startswith(_BEARER):
            raise Unauthenticated("the metadata `authorization` must have the scheme `Bearer` and a token")
        name = self._tokens.name_of(credentials[len(_BEARER) :].strip()) if self._tokens else None
        if name is None:
            raise Unauthenticated("the token is not, or no longer, known here")
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
