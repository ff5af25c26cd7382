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
_WAIT_SECONDS = 20.0


def _put_large_container(name: str, megabytes: float = 0.25) -> list[StoreChange]:
    labels = {"big": "x" * int(megabytes * (1 << 20))}
    spec = container(name).spec.changed(labels=labels)
    return [PutContainer(container(name, spec=spec), expect=0)]


async def _store_ended_operation(store: EtcdStore, number: int, **changes: object) -> None:
    """Store an ended operation; ids sort newest first, so a larger `number` is a newer operation."""
    operation_id = f"op-{999 - number}"
    running = operation(operation_id, f"c{number}", arguments={"a": "b" * 1000})
    version = await store.apply([PutOperation(running, expect=0)])
    ended = running.changed(state=OperationState.SUCCEEDED, result=container(f"c{number}"), **changes)
    await store.apply([PutOperation(ended, expect=version)])


async def test_ended_operations_and_their_results_are_limited(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    unfinished = operation("op-9999", "old", arguments={"a": 1})
    await store.apply([PutOperation(unfinished, expect=0)])
    for number in range(6):
        await _store_ended_operation(store, number)
    size = len(container("c0").model_dump_json())
    trimmer = OperationTrimmer(connection, OperationParts(Keys(prefix)), operations=4, result_bytes=int(2.5 * size))
    due = trimmer.due
    assert due, "a daemon before this one may have stored more operations than the limit"
    await trimmer.trim()
    due_again = trimmer.due
    assert not due_again
    remaining = (await store.operations(page_size=100, page_token="")).items
    # A running operation stays, however old it is.
    assert [item.id for item in remaining] == ["op-994", "op-995", "op-996", "op-997", "op-9999"]
    results = [stored.value.result for item in remaining if (stored := await store.operation(item.id))]
    assert results == [container("c5"), container("c4"), None, None, None]
    stored_running = await store.operation("op-9999")
    assert stored_running is not None
    assert stored_running.value == unfinished


@pytest_asyncio.fixture
async def small_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[EtcdStore, EtcdFiller]]:
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
async def test_etcd_is_compacted_and_defragmented_when_its_file_grows(
    small_store: tuple[EtcdStore, EtcdFiller],
) -> None:
    store, filler = small_store
    await store.apply(_put_large_container("kept"))
    for _ in range(8):
        # Too little at a time to reach the quota.
        await filler.overwrite(4 << 20)

        async def file_is_small() -> bool:
            usage = await store.usage()
            return usage.size_bytes < _QUOTA // 2

        await until(file_is_small, seconds=_WAIT_SECONDS)
    usage = await store.usage()
    assert (usage.quota_bytes, usage.full) == (_QUOTA, "")
    assert await store.container("kept") is not None


async def test_a_full_store_accepts_only_operations_that_free_space(small_store: tuple[EtcdStore, EtcdFiller]) -> None:
    store, _ = small_store
    for number in range(68):
        await store.apply(_put_large_container(f"c{number}"))

    async def is_full() -> bool:
        return bool((await store.usage()).full)

    await until(is_full, seconds=_WAIT_SECONDS)
    with pytest.raises(StoreFull, match="delete containers") as raised:
        await store.apply([PutOperation(operation("op1", kind=OperationKind.UPDATE), expect=0)])
    assert raised.value.reason == "STORE_FULL"
    assert "etcd_quota is 16 MiB" in raised.value.message
    for number in range(20):
        view = await store.container(f"c{number}")
        assert view is not None
        await store.apply(
            [
                PutOperation(operation(f"op{number}", kind=OperationKind.DELETE), expect=0),
                DeleteContainer(f"c{number}", f"uid-c{number}", view.version),
            ]
        )

    async def has_space() -> bool:
        return not await is_full()

    await until(has_space, seconds=_WAIT_SECONDS)
    await store.apply([PutOperation(operation("op-new", kind=OperationKind.UPDATE), expect=0)])


@pytest.mark.deep
async def test_space_that_other_clients_free_is_noticed(small_store: tuple[EtcdStore, EtcdFiller]) -> None:
    """Compaction is triggered by growth, and a deletion causes none; this daemon writes nothing either."""
    store, filler = small_store

    async def is_full() -> bool:
        return bool((await store.usage()).full)

    while not await is_full():
        # The steps are small, so that the maintenance finds the store full before etcd raises its alarm.
        before = (await store.usage()).in_use_bytes

        async def usage_has_grown(before: int = before) -> bool:
            return (await store.usage()).in_use_bytes > before

        await filler.put(8, 64 << 10)
        await until(usage_has_grown, seconds=_WAIT_SECONDS)
    with capture_logs() as events:
        # This write causes a compaction, so that only the deletion below is not compacted.
        await filler.put(1, 1 << 10)
        with pytest.raises(StoreFull):
            await store.apply([PutOperation(operation("op1", kind=OperationKind.UPDATE), expect=0)])

        async def is_compacted() -> bool:
            return any(line["event"] == "etcd compacted" for line in events)

        await until(is_compacted, seconds=_WAIT_SECONDS)
        assert await is_full()
        await filler.delete()

        async def has_space() -> bool:
            return not await is_full()

        await until(has_space, seconds=_WAIT_SECONDS)
    usage = await store.usage()
    assert usage.in_use_bytes < _QUOTA
    assert [line["event"] for line in events].count("store has space again") == 1
