"""Faults that an engine proxy injects between a client and the engine, and the requests that they apply to."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from .http_framing import answer


@dataclass
class Request:
    """A request that came through an engine proxy."""

    method: str
    path: str
    """Without the API version and the query."""
    query: str
    engine_status: int | None = None
    """The status of the engine's answer; None if the engine has not received the request or not answered."""
    status: int | None = None
    """The status that was sent to the client; None if nothing was sent so far."""
    fault: "Fault | None" = None
    """The fault that was applied to the request."""

    @property
    def mutates(self) -> bool:
        """Whether the request may change something in the engine."""
        return self.method not in {"GET", "HEAD"}


class Kind(Enum):
    """What a fault does to a request."""

    ANSWER = "answer"
    HANG = "hang"
    DROP = "drop"


@dataclass
class Fault:
    """An injected fault, with the requests that it applies to."""

    kind: Kind
    matches: Callable[[Request], bool]
    after: bool
    """False: the engine does not get the request. True: the engine executes it, and its answer is not sent."""
    skip: int
    """How many matching requests still pass without the fault."""
    times: int | None
    """To how many requests after those it still applies; None for all."""
    answer: bytes = b""
    """The raw answer of Kind.ANSWER."""
    hit: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the fault was applied to a request; with `after`, once the engine has executed that request."""
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Let hanging requests continue: to the engine if the client is still there; with `after`, to the client."""
        self.released.set()

    def applies_to(self, request: Request) -> bool:
        """Count a request; returns whether the fault applies to it."""
        if self.times == 0 or not self.matches(request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Faults:
    """The injected faults. `method` and `path` of every method are regular expressions that must match completely.

    `path` is without version and query, such as `/containers/[^/]+/start`. `nth` is the number of the first matching
    request that gets the fault, counted from now; `times` is the number of requests from that one on (None: all); with
    `after` the engine executes the request first. Of several faults the oldest that applies is used.
    """

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def fail(
        self,
        method: str,
        path: str,
        *,
        status: int = 500,
        message: str = "injected",
        nth: int = 1,
        times: int | None = 1,
        after: bool = False,
    ) -> Fault:
        """Answer with an error of this status and message."""
        return self._add(Kind.ANSWER, method, path, nth, times, after=after, data=answer(status, message))

    def hang(self, method: str, path: str, *, nth: int = 1, times: int | None = 1, after: bool = False) -> Fault:
        """Keep the client waiting until `Fault.release` or `clear`."""
        return self._add(Kind.HANG, method, path, nth, times, after=after)

    def drop(self, method: str, path: str, *, nth: int = 1, times: int | None = 1, after: bool = False) -> Fault:
        """Close the client's connection without an answer."""
        return self._add(Kind.DROP, method, path, nth, times, after=after)

    def clear(self) -> None:
        """Remove all faults, and let hanging requests continue."""
        for fault in self._faults:
            fault.release()
        self._faults.clear()

    @property
    def met(self) -> bool:
        """Whether one of the faults was applied to a request."""
        return any(fault.hit.is_set() for fault in self._faults)

    def match(self, request: Request) -> Fault | None:
        """The fault for this request, if any."""
        return next((fault for fault in self._faults if fault.applies_to(request)), None)

    def _add(
        self, kind: Kind, method: str, path: str, nth: int, times: int | None, *, after: bool, data: bytes = b""
    ) -> Fault:
        methods, paths = re.compile(method), re.compile(path)

        def matches(request: Request) -> bool:
            return bool(methods.fullmatch(request.method) and paths.fullmatch(request.path))

        fault = Fault(kind, matches, after=after, skip=nth - 1, times=times, answer=data)
        self._faults.append(fault)
        return fault
