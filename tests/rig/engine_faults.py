"""What is to go wrong between a client and the engine, and which request is to meet it."""

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
    """What the engine answered; None if it was not asked, or has not answered."""
    status: int | None = None
    """What the client was told; None if nothing (yet)."""
    fault: "Fault | None" = None
    """The fault that it met."""

    @property
    def mutates(self) -> bool:
        """Whether it may change something in the engine."""
        return self.method not in {"GET", "HEAD"}


class Kind(Enum):
    """What a fault does to a request."""

    ANSWER = "answer"
    HANG = "hang"
    DROP = "drop"


@dataclass
class Fault:
    """A fault that waits for its request."""

    kind: Kind
    matches: Callable[[Request], bool]
    after: bool
    """False: the engine never sees the request. True: the engine has done it, and the client is not told so."""
    skip: int
    """How many matching requests still pass unharmed."""
    times: int | None
    """How many are still to be met after those; None for all."""
    answer: bytes = b""
    """The raw answer of Kind.ANSWER."""
    hit: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a request has met the fault; with `after`, once the engine has done it."""
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Lets what hangs go on: to the engine, unless its client has gone; with `after`, to the client."""
        self.released.set()

    def takes(self, request: Request) -> bool:
        """Counts a request; whether it is to meet this fault."""
        if self.times == 0 or not self.matches(request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Faults:
    """The faults in force. In every method `method` and `path` are regular expressions that must match the whole.

    `path` is without version and query, such as `/containers/[^/]+/start`; `nth` says which of the matching requests,
    counted from now, is the first to meet the fault, `times` how many from that one on (None: all), and `after` whether
    the engine is to do it first. Of several faults a request meets the oldest that takes it.
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
        """Answers with an error of this status and message."""
        return self._add(Kind.ANSWER, method, path, nth, times, after=after, data=answer(status, message))

    def hang(self, method: str, path: str, *, nth: int = 1, times: int | None = 1, after: bool = False) -> Fault:
        """Keeps the client waiting until `Fault.release` or `clear`."""
        return self._add(Kind.HANG, method, path, nth, times, after=after)

    def drop(self, method: str, path: str, *, nth: int = 1, times: int | None = 1, after: bool = False) -> Fault:
        """Closes the client's connection without an answer."""
        return self._add(Kind.DROP, method, path, nth, times, after=after)

    def clear(self) -> None:
        """Forgets all faults, and lets what hangs go on."""
        for fault in self._faults:
            fault.release()
        self._faults.clear()

    @property
    def met(self) -> bool:
        """Whether a request has met one of the faults in force."""
        return any(fault.hit.is_set() for fault in self._faults)

    def meet(self, request: Request) -> Fault | None:
        """The fault that this request meets, if any."""
        return next((fault for fault in self._faults if fault.takes(request)), None)

    def _add(
        self, kind: Kind, method: str, path: str, nth: int, times: int | None, *, after: bool, data: bytes = b""
    ) -> Fault:
        methods, paths = re.compile(method), re.compile(path)

        def matches(request: Request) -> bool:
            return bool(methods.fullmatch(request.method) and paths.fullmatch(request.path))

        fault = Fault(kind, matches, after=after, skip=nth - 1, times=times, answer=data)
        self._faults.append(fault)
        return fault
