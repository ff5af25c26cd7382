"""Limits for ended operations, and compaction and defragmentation of the embedded etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from gpudock_server.adapters.etcd import EmbeddedEtcd, EtcdConnection, EtcdStore, maintenance
from gpudock_server.adapters.etcd.keys import Keys
from gpudock_server.adapters.etcd.operation_parts import OperationParts
from gpudock_server.adapters.etcd.trimmer import OperationTrimmer
from gpudock_server.errors import StoreFull
from gpudock_server.model.operation import OperationKind, OperationState
from gpudock_server.model.store_changes import DeleteContainer, PutContainer, PutOperation, StoreChange
from structlog.testing import capture_logs

from tests.engine.etcd_examples import container, open_connection, operation
from tests.engine.isolated_daemons import until
from tests.rig.etcd_filler import EtcdFiller

pytest_plugins = ["tests.engine.etcd_fixtures"]

_QUOTA = 16 << 20
_SECONDS = 20.0


def _big(name: str, megabytes: float = 0.25) -> list[StoreChange]:
    labels = {"big": "x" * int(megabytes * (1 << 20))}
    spec = container(name).spec.changed(labels=labels)
    return [PutContainer(container(name, spec=spec), expect=0)]


async def _end(store: EtcdStore, number: int, **changes: object) -> None:
    """Store an ended operation; ids sort newest first, so a larger `number` is a newer operation."""
    id_ = f"op-{999 - number}"
    running = operation(id_, f"c{number}", arguments={"a": "b" * 1000})
    version = await store.apply([PutOperation(running, expect=0)])
    ended = running.changed(state=OperationState.SUCCEEDED, result=container(f"c{number}"), **changes)
    await store.apply([PutOperation(ended, expect=version)])


async def test_what_has_ended_is_bounded(store: EtcdStore, connection: EtcdConnection, prefix: str) -> None:
    unfinished = operation("op-9999", "old", arguments={"a": 1})
    await store.apply([PutOperation(unfinished, expect=0)])
    for number in range(6):
        await _end(store, number)
    size = len(container("c0").model_dump_json())
    trimmer = OperationTrimmer(connection, OperationParts(Keys(prefix)), operations=4, result_bytes=int(2.5 * size))
    due = trimmer.due
    assert due, "the daemon before may have left something"
    await trimmer.trim()
    due_again = trimmer.due
    assert not due_again
    left = (await store.operations(page_size=100, page_token="")).items
    # A running operation stays, however old it is.
    assert [one.id for one in left] == ["op-994", "op-995", "op-996", "op-997", "op-9999"]
    results = [stored.value.result for one in left if (stored := await store.operation(one.id))]
    assert results == [container("c5"), container("c4"), None, None, None]
    kept = await store.operation("op-9999")
    assert kept is not None
    assert kept.value == unfinished


@pytest_asyncio.fixture
async def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[EtcdStore, EtcdFiller]]:
    """A store in an embedded etcd with a small quota and frequent checks."""
    monkeypatch.setattr(maintenance, "CHECK_SECONDS", 0.05)
    etcd = EmbeddedEtcd(tmp_path, quota_bytes=_QUOTA, allow_inconsistent=True)
    await etcd.start()
    endpoint = etcd.address.endpoints[0]
    async with open_connection(endpoint) as connection, EtcdFiller(endpoint) as filler:
        store = EtcdStore(connection, quota_bytes=_QUOTA)
        await store.start_maintenance()
        await store.open()
        yield store, filler
        await store.close()
    await etcd.close()


@pytest.mark.deep
async def test_history_is_compacted_and_the_file_defragmented_by_size(small: tuple[EtcdStore, EtcdFiller]) -> None:
    store, filler = small
    await store.apply(_big("kept"))
    for _ in range(8):
        # Not enough at a time to be refused for want of room.
        await filler.overwrite(4 << 20)

        async def given_back() -> bool:
            usage = await store.usage()
            return usage.size_bytes < _QUOTA // 2

        await until(given_back, seconds=_SECONDS)
    usage = await store.usage()
    assert (usage.quota_bytes, usage.full) == (_QUOTA, "")
    assert await store.container("kept") is not None


async def test_where_data_reach_the_quota_only_what_frees_begins(small: tuple[EtcdStore, EtcdFiller]) -> None:
    store, _ = small
    for number in range(68):
        await store.apply(_big(f"c{number}"))

    async def full() -> bool:
        return bool((await store.usage()).full)

    await until(full, seconds=_SECONDS)
    with pytest.raises(StoreFull, match="delete containers") as refused:
        await store.apply([PutOperation(operation("op1", kind=OperationKind.UPDATE), expect=0)])
    assert refused.value.reason == "STORE_FULL"
    assert "etcd_quota is 16 MiB" in refused.value.message
    for number in range(20):
        view = await store.container(f"c{number}")
        assert view is not None
        await store.apply(
            [
                PutOperation(operation(f"op{number}", kind=OperationKind.DELETE), expect=0),
                DeleteContainer(f"c{number}", f"uid-c{number}", view.version),
            ]
        )

    async def room() -> bool:
        return not await full()

    await until(room, seconds=_SECONDS)
    await store.apply([PutOperation(operation("op-new", kind=OperationKind.UPDATE), expect=0)])


@pytest.mark.deep
async def test_room_that_others_deletions_give_is_found(small: tuple[EtcdStore, EtcdFiller]) -> None:
    """A deletion makes no growth, which is what history is compacted by, and nothing of this daemon asks for room."""
    store, filler = small

    async def full() -> bool:
        return bool((await store.usage()).full)

    while not await full():
        # In small steps: the maintenance must find the store full before etcd raises its alarm.
        before = (await store.usage()).in_use_bytes

        async def seen(before: int = before) -> bool:
            return (await store.usage()).in_use_bytes > before

        await filler.put(8, 64 << 10)
        await until(seen, seconds=_SECONDS)
    with capture_logs() as logged:
        # So that all that was written is compacted, and the deletion below alone is not.
        await filler.put(1, 1 << 10)
        with pytest.raises(StoreFull):
            await store.apply([PutOperation(operation("op1", kind=OperationKind.UPDATE), expect=0)])

        async def compacted() -> bool:
            return any(line["event"] == "etcd compacted" for line in logged)

        await until(compacted, seconds=_SECONDS)
        assert await full()
        await filler.delete()

        async def room() -> bool:
            return not await full()

        await until(room, seconds=_SECONDS)
    usage = await store.usage()
    assert usage.in_use_bytes < _QUOTA
    assert [line["event"] for line in logged].count("store has space again") == 1
