"""Lists a key range in pages that all show the state at the revision of the first page.

A page token holds this revision and the last key of the page. etcd keeps old revisions until it compacts them; then the
token has expired.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.connection import CallFailed, EtcdConnection
from gpudock_server.adapters.etcd.keys import KeyRange
from gpudock_server.adapters.etcd.messages import KeyValue
from gpudock_server.errors import FieldViolation, InvalidArgument, ResumeTokenExpired
from gpudock_server.tokens import decode_position, encode_position


@dataclass(frozen=True, slots=True)
class ListPage:
    """The entries of a page, all `companions` at the same revision, and the token of the next page (empty: none)."""

    entries: tuple[KeyValue, ...]
    companions: tuple[KeyValue, ...]
    next_token: str
    revision: int


async def list_page(
    connection: EtcdConnection,
    keys: KeyRange,
    companions: KeyRange | None,
    *,
    size: int,
    token: str,
    retry_for: timedelta,
) -> ListPage:
    """At most `size` entries of `keys` after those that `token` stands for, and all of `companions`.

    Raises InvalidArgument (page_token), ResumeTokenExpired, CallFailed.
    """
    if size < 1:
        raise ValueError(f"page size must be at least 1, got {size}")
    revision, rest = _resume(token, keys) if token else (0, keys)
    reads = [messages.get_range(rest, limit=size, revision=revision)]
    if companions:
        reads.append(messages.get_range(companions, revision=revision))
    try:
        answer = await connection.read(*reads, retry_for=retry_for)
    except CallFailed as failure:
        if failure.code == "OUT_OF_RANGE" and token:
            if "compacted" in failure.detail:
                raise ResumeTokenExpired(token) from None
            raise _invalid_token() from None
        raise
    page = answer.ranges[0]
    revision = revision or answer.revision
    return ListPage(
        entries=page.entries,
        companions=answer.ranges[1].entries if companions else (),
        next_token=encode_position(revision=revision, key=page.entries[-1].key) if page.more else "",
        revision=revision,
    )


def _resume(token: str, keys: KeyRange) -> tuple[int, KeyRange]:
    try:
        phase, revision, key = decode_position(token)
    except ValueError:
        raise _invalid_token() from None
    if phase or not keys.holds(key):
        raise _invalid_token()
    return revision, keys.after(key)


def _invalid_token() -> InvalidArgument:
    return InvalidArgument((FieldViolation("page_token", "must be a next_page_token of the same listing"),))
