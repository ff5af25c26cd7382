"""Fills pages of lists: from the store, which is read in parts, or from a list in memory."""

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

# By default, clients accept messages of up to 4 MiB.
_PAGE_BYTES = 3 * 1024 * 1024
# Reads of the store for one page. After that a shorter page is returned; its token continues the list.
_MAX_READS = 100
_NUMBER = re.compile("[0-9]{1,9}")


async def from_store(
    listing: ListRequest[T], read: Callable[[int, str], Awaitable[Page[T]]], convert: Callable[[T], M]
) -> tuple[list[M], str]:
    """Fill a page from `read(page_size, page_token)`. Returns the messages and the `next_page_token`.

    A list of the store can only continue where a read ended. So if the messages do not fit into one response, the page
    is read again with a smaller size.
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
    """How many of the messages fit into one response; at least one."""
    remaining = _PAGE_BYTES
    for count, message in enumerate(messages):
        remaining -= message.ByteSize()
        if remaining < 0:
            return max(count, 1)
    return len(messages)


def from_memory(listing: ListRequest[T], items: Sequence[T]) -> tuple[Sequence[T], str]:
    """A page of `items` and its `next_page_token`, which is the index of the first item of the next page."""
    resume = listing.resume or "0"
    if not _NUMBER.fullmatch(resume):
        raise InvalidArgument((FieldViolation("page_token", "is not a page_token of this list"),))
    first = int(resume)
    matches = [item for item in items if listing.matches(item)]
    last = first + listing.size
    return matches[first:last], listing.token(str(last) if last < len(matches) else "")
