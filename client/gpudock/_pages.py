"""Lists that are read page by page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable
from copy import deepcopy
from typing import Any, Generic, TypeVar

import grpc.aio

from gpudock._calls import Calls

T = TypeVar("T")
Q = TypeVar("Q")
R = TypeVar("R")


class Pages(Generic[T]):
    """A list that is read page by page: `async for item in pages`, or `items = await pages` for all items.

    All pages show the state of the same moment. Reading raises OutOfRange if it takes so long that the server no longer
    keeps that state; then start again.
    """

    def __init__(
        self,
        calls: Calls,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        items: Callable[[R], Iterable[T]],
    ) -> None:
        """`request` is that of the first page; `items` returns the items of a response."""
        self._calls = calls
        self._method: grpc.aio.UnaryUnaryMultiCallable[Any, Any] = method
        self._request: Any = request
        self._items: Callable[[Any], Iterable[T]] = items

    async def __aiter__(self) -> AsyncIterator[T]:
        """Yield all items in order."""
        request = deepcopy(self._request)
        while True:
            answer = await self._calls.read(self._method, request)
            for item in self._items(answer):
                yield item
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    def __await__(self) -> Generator[object, None, list[T]]:
        """Return all items as a list."""
        return self._all().__await__()

    async def _all(self) -> list[T]:
        return [item async for item in self]
