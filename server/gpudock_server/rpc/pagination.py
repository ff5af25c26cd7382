"""Fills pages of lists: from the store, which is read in parts, or from a list in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from google.protobuf.message import Message

from gpudock_server.core.listings import StoreListing
from gpudock_server.errors import FieldViolation, InvalidArgument
from gpudock_server.rpc.list_requests import ListRequest

T = TypeVar("T")
M = TypeVar("M", bound=Message)

# By default, clients accept messages of up to 4 MiB.
_PAGE_BYTES = 3 * 1024 * 1024
# Reads of the store for one page. After that a shorter page is returned; its token continues the list.
_MAX_READS = 100
_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class MessagePage(Generic[M]):
    """The messages of a page, its `next_page_token`, and the position from which a watch reports later changes."""

    messages: list[M]
    next_token: str
    watch_position: str


async def from_store(listing: ListRequest[T], read: StoreListing[T], convert: Callable[[T], M]) -> MessagePage[M]:
    """Fill a page from a listing of the store.

    A list of the store can only continue where a read ended. So if the messages do not fit into one response, the page
    is read again with a smaller size.
    """
    size = listing.size
    while True:
        page = await _read_page(listing, size, read, convert)
        fitting = _count_that_fits(page.messages)
        if fitting == len(page.messages):
            return replace(page, next_token=listing.token(page.next_token))
        size = fitting


async def _read_page(
    listing: ListRequest[T], size: int, read: StoreListing[T], convert: Callable[[T], M]
) -> MessagePage[M]:
    """The page, with the position of the next one as its token."""
    messages: list[M] = []
    position, watch_position = listing.resume, ""
    for _ in range(_MAX_READS):
        page = await read(page_size=size - len(messages), page_token=position)
        messages += [convert(item) for item in page.items if listing.matches(item)]
        position, watch_position = page.next_token, page.watch_token
        if not position or len(messages) >= size:
            break
    return MessagePage(messages, position, watch_position)


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
