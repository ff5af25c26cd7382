"""EtcdStore on a real etcd: changes and conflicts, concurrency, pages, expiry, and state of other schemas."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta

import pytest
from gpudock_server.adapters.etcd import (
    EtcdConnection,
    EtcdStore,
    messages,
)
from gpudock_server.adapters.etcd.keys import SCHEMA, KeyRange, Keys
from gpudock_server.adapters.etcd.values import encode_number
from gpudock_server.core.listings import read_all_pages
from gpudock_server.errors import InvalidArgument, RecordUnreadable, ResumeTokenExpired, StoreUnavailable
from gpudock_server.model.claims import GpuKey, PortKey
from gpudock_server.model.operation import OperationState, RequestRecord
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Protocol
from gpudock_server.model.store_changes import (
    Claim,
    DeleteContainer,
    Lock,
    PutContainer,
    PutOperation,
    PutRequest,
    PutRevision,
    ReleaseClaim,
    StoreChange,
    Unlock,
)
from gpudock_server.ports import ContainerView, Page, StoreConflict
from gpudock_server.startup import StartupError
from gpudock_server.tokens import encode_position

from tests.engine.etcd_examples import (
    EXAMPLE_TIME,
    GPU,
    RETRY_TIME,
    begin_changes,
    container,
    holder,
    open_connection,
    operation,
    revision,
)
from tests.engine.isolated_daemons import until
from tests.rig import Rig
from tests.rig.patience import limit

pytest_plugins = ["tests.engine.etcd_fixtures"]


async def _read_all_keys(connection: EtcdConnection, prefix: str) -> dict[bytes, bytes]:
    """All keys below the prefix."""
    keys = KeyRange(prefix.encode(), prefix[:-1].encode() + b"0")
    answer = await connection.read(messages.get_range(keys), retry_for=RETRY_TIME)
    return {entry.key: entry.value for entry in answer.ranges[0].entries}


async def test_deleted_records_leave_no_key(store: EtcdStore, connection: EtcdConnection, prefix: str) -> None:
    version = await store.apply(
        [
            Lock(ResourceKind.CONTAINER, "web", "op1"),
            PutContainer(container("web"), expect=0),
            PutRevision(revision("web", 1)),
            Claim("h1", GPU, holder("web", "op1")),
            Claim("h1", GpuKey("GPU-2"), holder("other")),
            PutRequest("r1", RequestRecord(operation_id="op1", digest="d")),
        ]
    )
    await store.apply(
        [
            DeleteContainer("web", "uid-web", expect=version),
            ReleaseClaim("h1", GPU, "uid-web"),
            Unlock(ResourceKind.CONTAINER, "web", "op1"),
        ]
    )
    keys = {key.removeprefix(prefix.encode()) for key in await _read_all_keys(connection, prefix)}
    assert keys == {b"schema", b"hosts/h1/gpus/GPU-2", b"requests/r1"}


async def test_changes_that_are_too_large_are_refused(store: EtcdStore) -> None:
    with pytest.raises(InvalidArgument, match="one transaction"):
        await store.apply([Claim("h1", PortKey(Protocol.UDP, port), holder("web")) for port in range(129)])
    with pytest.raises(InvalidArgument, match="too large"):
        await store.apply([PutOperation(operation("op", message="x" * 2_000_000), expect=0)])
    assert await store.operation("op") is None
    most: list[StoreChange] = [Claim("h1", PortKey(Protocol.UDP, port), holder("web")) for port in range(125)]
    await store.apply([DeleteContainer("web", "uid-web", expect=0), *most])
    assert len((await store.claims("h1")).claims) == 125


# ---- concurrency ----


async def claim_concurrently(endpoint: str, prefix: str, names: Sequence[str], gpus: int) -> int:
    """The number of `names` that claimed one of `gpus` GPUs; each tries all GPUs, from a different one on."""
    async with open_connection(endpoint) as connection:
        store = EtcdStore(connection, prefix=prefix)

        async def claim_any(number: int, name: str) -> bool:
            for attempt in range(gpus):
                key = GpuKey(f"GPU-{(number + attempt) % gpus}")
                try:
                    await store.apply([*begin_changes(name, name), Claim("h1", key, holder(name, name))])
                except StoreConflict as conflict:
                    if not isinstance(conflict.change, Claim):
                        raise
                else:
                    return True
            return False

        return sum(await asyncio.gather(*(claim_any(number, name) for number, name in enumerate(names))))


async def test_a_hundred_claimers_in_two_processes_get_eight_gpus(rig: Rig, store: EtcdStore, prefix: str) -> None:
    script = (
        "import asyncio, sys; from tests.engine.test_etcd_store import claim_concurrently;"
        "print(asyncio.run(claim_concurrently(*sys.argv[1:3], [f'b{n}' for n in range(50)], 8)))"
    )
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, rig.etcd.endpoint, prefix, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    own_count = await claim_concurrently(rig.etcd.endpoint, prefix, [f"a{number}" for number in range(50)], 8)
    other_count = int((await other.communicate())[0])
    assert own_count + other_count == 8
    claims = (await store.claims("h1")).claims
    assert len({each.uid for each in claims.values()}) == len(claims) == 8
    assert len(await store.unfinished("n1")) == 8, "a refused operation has left a record"


# ---- pages ----


async def test_a_page_token_of_a_future_or_compacted_revision_is_refused(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    for name in ("a", "b", "c"):
        await store.apply([PutContainer(container(name), expect=0)])
    token = (await store.containers(page_size=1, page_token="")).next_token
    with pytest.raises(InvalidArgument) as refused:
        await store.containers(page_size=1, page_token=encode_position(revision=2**62, key=Keys(prefix).container("a")))
    assert [violation.field for violation in refused.value.violations] == ["page_token"]
    version = await store.apply([PutContainer(container("d"), expect=0)])
    await connection._client.compact(version, physical=True)
    with pytest.raises(ResumeTokenExpired):
        await store.containers(page_size=1, page_token=token)


async def test_reading_all_pages_starts_again_after_a_compaction(store: EtcdStore, connection: EtcdConnection) -> None:
    names = ["a", "b", "c"]
    for name in names:
        await store.apply([PutContainer(container(name), expect=0), PutOperation(operation(name), expect=0)])
    first_pages = 0
    compactions = 2

    async def list_and_compact(*, page_size: int, page_token: str) -> Page[ContainerView]:
        nonlocal first_pages
        page = await store.containers(page_size=min(page_size, 2), page_token=page_token)
        if not page_token:
            first_pages += 1
            if first_pages <= compactions:
                head = await store.container("a")
                assert head is not None
                version = await store.apply([PutContainer(head.container, expect=head.version)])
                await connection._client.compact(version, physical=True)
        return page

    assert [view.container.name for view in (await read_all_pages(list_and_compact)).items] == names
    assert first_pages == compactions + 1
    compactions = 1000
    with pytest.raises(StoreUnavailable, match="compacted"):
        await read_all_pages(list_and_compact)


# ---- expiry ----


async def test_ended_operations_expire_and_running_ones_do_not(connection: EtcdConnection, prefix: str) -> None:
    brief = timedelta(seconds=limit(1))
    store = EtcdStore(connection, prefix=prefix, retention=brief, bucket=brief)
    record = RequestRecord(operation_id="op1", digest="d")
    version = await store.apply([PutOperation(operation("op1"), expect=0), PutRequest("r1", record)])
    await store.apply([PutOperation(operation("op2"), expect=0), PutRequest("r2", record)])
    ended = operation("op1", state=OperationState.SUCCEEDED, end_time=EXAMPLE_TIME)
    await store.apply([PutOperation(ended, expect=version), PutRequest("r1", record, ended=True)])
    assert await store.request("r1") == record

    async def expired() -> bool:
        return await store.operation("op1") is None

    await until(expired, seconds=15)
    assert await store.request("r1") is None
    assert await store.operation("op2") is not None
    assert await store.request("r2") == record


async def test_operations_that_end_on_one_day_share_a_lease(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    async def end(number: int) -> int:
        ended = operation(f"op{number}", state=OperationState.FAILED)
        return await store.apply([PutOperation(ended, expect=0)])

    await asyncio.gather(*(end(number) for number in range(20)))
    keys = [Keys(prefix).operation(f"op{number}") for number in range(22)]
    read = await connection.read(*map(messages.get, keys), retry_for=RETRY_TIME)
    leases = {found.only.lease for found in read.ranges if found.only}
    assert len(leases) == 1
    (lease,) = leases
    remaining = (await connection._client.get_lease_info(lease)).TTL
    assert 24 * 3600 < remaining <= 26 * 3600
    # After a revocation of the lease, or its expiry in a long outage, the next key gets a new lease.
    await connection.revoke(lease)
    await end(21)
    assert (await store.operation("op21")) is not None
    assert (await store.operation("op1")) is None


# ---- schema and login ----


async def test_a_newer_schema_is_refused_at_start_and_at_every_value(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    keys, newer = Keys(prefix), SCHEMA + 1
    await store.open()
    await connection.txn(success=[messages.put(keys.container("web"), b'{"schema":%d,"record":{"new":1}}' % newer)])
    with pytest.raises(
        RecordUnreadable, match=f"containers/web cannot be read: written in schema {newer} by a newer gpudock"
    ):
        await store.container("web")
    await connection.txn(success=[messages.put(keys.container("web"), b"hello")])
    with pytest.raises(RecordUnreadable, match="not a gpudock record"):
        await store.container("web")
    await connection.txn(success=[messages.put(keys.schema(), encode_number(newer))])
    with pytest.raises(StartupError, match=f"has schema {newer}; this gpudockd supports up to {SCHEMA}") as refused:
        await store.open()
    assert "install the gpudock version that wrote it" in refused.value.hint
    await connection.txn(success=[messages.put(keys.schema(), b"{}")])
    with pytest.raises(StartupError, match="not a number"):
        await store.open()


async def test_state_of_schema_1_is_upgraded(store: EtcdStore, connection: EtcdConnection, prefix: str) -> None:
    keys = Keys(prefix)
    record = json.loads(operation("op1").model_dump_json())
    del record["target"], record["locks"]
    record |= {"container": "web", "container_uid": "uid-web"}
    old = json.dumps({"schema": 1, "record": record}).encode()
    await connection.txn(
        success=[
            messages.put(keys.schema(), b"1"),
            messages.put(keys.operation("op1"), old),
            messages.put(keys.lock(ResourceKind.CONTAINER, "web"), b"op1"),
        ]
    )
    await store.open()
    (unfinished,) = await store.unfinished("n1")
    assert unfinished.value == operation("op1")
    # The schema is raised, so that an older daemon does not write into a state that it does not support.
    read = await connection.read(messages.get(keys.schema()), retry_for=RETRY_TIME)
    assert read.ranges[0].only is not None
    assert read.ranges[0].only.value == encode_number(SCHEMA)


async def test_an_operation_of_schema_2_is_continued_in_the_current_schema(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    keys = Keys(prefix)
    begun = operation("op1", arguments={"spec": {"image": "x"}}, result=container("web"))
    await connection.txn(
        success=[messages.put(keys.operation("op1"), b'{"schema":2,"record":%s}' % begun.model_dump_json().encode())]
    )
    stored = await store.operation("op1")
    assert stored is not None
    assert stored.value == begun
    step = begun.changed(message="a step further")
    await store.apply([PutOperation(step, expect=stored.version)])
    # Another daemon that resumes the operation reads the whole record.
    second_store = EtcdStore(connection, prefix=prefix)
    taken = await second_store.operation("op1")
    assert taken is not None
    assert taken.value == step
    small = (await connection.read(messages.get(keys.operation("op1")), retry_for=RETRY_TIME)).ranges[0].only
    assert small is not None
    assert b"image" not in small.value
    await second_store.apply([PutOperation(step.changed(state=OperationState.SUCCEEDED), expect=taken.version)])
    ended = await store.operation("op1")
    assert ended is not None
    assert (ended.value.arguments, ended.value.result) == ({}, container("web"))
