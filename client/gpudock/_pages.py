"""Lists that come in pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pages(Generic[T]):
    """All of a list, page by page: `async for item in pages`, or `items = await pages` for all at once.

    All pages show the same moment. If reading takes so long that the server no longer keeps that moment, it ends with
    OutOfRange: begin again.
    """

    def __init__(self, page: Callable[[str], Awaitable[tuple[Iterable[T], str]]]) -> None:
        """`page` gives the items of the page with that token, and the token of the next one, empty after the last."""
        self._page = page

    async def __aiter__(self) -> AsyncIterator[T]:
        """Every item, in the list's order."""
        token = ""
        while True:
            items, token = await self._page(token)
            for item in items:
                yield item
            if not token:
                return

    def __await__(self) -> Generator[object, None, list[T]]:
        """Every item, in one list."""
        return self._all().__await__()

    async def _all(self) -> list[T]:
        return [item async for item in self]
