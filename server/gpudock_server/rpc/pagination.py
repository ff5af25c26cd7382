"""Fills pages: of listings that the store gives in parts, and of lists that are in memory as a whole."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from gpudock_server.errors import FieldViolation, InvalidArgument
from gpudock_server.ports import Page
from gpudock_server.rpc.list_requests import ListRequest

T = TypeVar("T")
M = TypeVar("M", bound=Message)

# A client takes messages of up to 4 MiB unless told otherwise.
_PAGE_BYTES = 3 * 1024 * 1024
# How often the store is asked for one page. Then a shorter one is given, which is no end as long as it has a token.
_MAX_READS = 100
_NUMBER = re.compile("[0-9]{1,9}")


async def from_store(
    listing: ListRequest[T], read: Callable[[int, str], Awaitable[Page[T]]], convert: Callable[[T], M]
) -> tuple[list[M], str]:
    """A page of what `read(page_size, page_token)` gives, and its `next_page_token`.

    Never more is read than still fits, since a store's listing can go on only where a read of it has ended.
    """
    size = listing.size
    while True:
        messages, resume = await _read_page(listing, size, read, convert)
        fitting = _count_that_fits(messages)
        if fitting == len(messages):
            return messages, listing.token(resume)
        size = fitting


async def _read_page(
    listing: ListRequest[T], size: int, read: Callable[[int, str], Awaitable[Page[T]]], convert: Callable[[T], M]
) -> tuple[list[M], str]:
    messages: list[M] = []
    resume = listing.resume
    for _ in range(_MAX_READS):
        page = await read(size - len(messages), resume)
        messages += [convert(item) for item in page.items if listing.matches(item)]
        resume = page.next_token
        if not resume or len(messages) >= size:
            break
    return messages, resume


def _count_that_fits(messages: Sequence[Message]) -> int:
    """How many of them go into one answer: all, or as many as there is room for, and always one."""
    room = _PAGE_BYTES
    for count, message in enumerate(messages):
        room -= message.ByteSize()
        if room < 0:
            return max(count, 1)
    return len(messages)


def from_memory(listing: ListRequest[T], items: Sequence[T]) -> tuple[Sequence[T], str]:
    """A page of `items`, and its `next_page_token`: the number of those before it."""
    resume = listing.resume or "0"
    if not _NUMBER.fullmatch(resume):
        raise InvalidArgument((FieldViolation("page_token", "is not one that this list gave out"),))
    first = int(resume)
    matches = [item for item in items if listing.matches(item)]
    last = first + listing.size
    return matches[first:last], listing.token(str(last) if last < len(matches) else "")
