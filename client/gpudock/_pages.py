"""Lists that are read page by page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pages(Generic[T]):
    """A list that is read page by page: `async for item in pages`, or `items = await pages` for all items.

    All pages show the state of the same moment. Reading raises OutOfRange if it takes so long that the server no longer
    keeps that state; then start again.
    """

    def __init__(self, page: Callable[[str], Awaitable[tuple[Iterable[T], str]]]) -> None:
        """`page` returns the items of the page with a token, and the token of the next page (empty after the last)."""
        self._page = page

    async def __aiter__(self) -> AsyncIterator[T]:
        """Yield all items in order."""
        token = ""
        while True:
            items, token = await self._page(token)
            for item in items:
                yield item
            if not token:
                return

    def __await__(self) -> Generator[object, None, list[T]]:
        """Return all items as a list."""
        return self._all().__await__()

    async def _all(self) -> list[T]:
        return [item async for item in self]
