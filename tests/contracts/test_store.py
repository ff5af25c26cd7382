"""ports.Store: transactions with their conditions, reads and pages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from gpudock_server.errors import InvalidArgument, ResumeTokenExpired
from gpudock_server.model.claims import ClaimKey, GpuKey
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.operation import Operation, OperationState, RequestRecord
from gpudock_server.model.record import now
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.snapshot import Snapshot, SnapshotKind, SnapshotSkipped
from gpudock_server.model.store_changes import (
    Claim,
    ConfirmClaim,
    DeleteContainer,
    DeleteImageOrigin,
    DeleteRevision,
    DeleteVolume,
    Lock,
    PutContainer,
    PutImageOrigin,
    PutOperation,
    PutRequest,
    PutRevision,
    PutSnapshot,
    PutVolume,
    PutVolumeRevision,
    ReleaseClaim,
    RequireUnlocked,
    RequireVolumeVersion,
    StoreChange,
    Unlock,
)
from gpudock_server.ports import ContainerView, RevisionView, Store, StoreConflict, Versioned, VolumeView

from tests.contracts.store_examples import Forget
from tests.engine.etcd_examples import (
    EXAMPLE_TIME,
    GPU,
    PORT,
    begin_changes,
    container,
    holder,
    operation,
    revision,
    volume,
    volume_revision,
)
from tests.rig.patience import limit

pytest_plugins = ["tests.contracts.store_fixtures"]

# MemoryStore also lacks: expiry of ended operations (tests/engine/test_etcd_store.py), unreadable records, limits of
# transactions and of the store, failures and heartbeats of daemons (FailingStore has both).
NOT_FAKED: dict[str, dict[str, str]] = {}

_RECORD = RequestRecord(operation_id="op1", digest="d")


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


async def test_a_new_store_is_empty_and_responds(store: Store) -> None:
    assert (await store.ping()).startswith("3.")
    usage = await store.usage()
    assert usage.full == ""
    assert 0 <= usage.in_use_bytes <= usage.size_bytes
    assert await store.list_locks() == ()
    assert await store.nodes() == ()
    assert await store.unfinished("n1") == ()
    assert not (await store.claims("h1")).claims
    for listed in (store.containers, store.volumes, store.operations):
        page = await listed(page_size=1, page_token="")
        assert (page.items, page.next_token, page.unreadable) == ((), "", ())


async def test_records_are_read_as_they_were_written(store: Store) -> None:
    head, running = container("web"), operation("op1", request_id="r/1")
    revisions = tuple(revision("web", number) for number in (1, 2, 11))
    version = await store.apply(
        [
            Lock(ResourceKind.CONTAINER, "web", "op1"),
            PutOperation(running, expect=0),
            PutContainer(head, expect=0),
            *(PutRevision(each) for each in reversed(revisions)),
            Claim("h1", GPU, holder("web", "op1")),
            Claim("h1", PORT, holder("web", "op1")),
            Claim("h2", GPU, holder("web", "op1")),
            PutRequest("r/1", _RECORD),
        ]
    )
    assert version > 0, "0 is the version of a missing record"
    assert await store.container("web") == ContainerView(head, version, "op1")
    assert await store.operation("op1") == Versioned(running, version)
    assert [view.revision for view in await store.history("uid-web")] == list(revisions)
    assert await store.revision("uid-web", 11) == RevisionView(revisions[2], None)
    assert dict((await store.claims("h1")).claims) == {GPU: holder("web", "op1"), PORT: holder("web", "op1")}
    assert await store.request("r/1") == _RECORD
    for missing in (
        store.container("we"),
        store.volume("web"),
        store.operation("op"),
        store.request("r"),
        store.revision("uid-web", 3),
    ):
        assert await missing is None
    assert await store.history("uid") == ()


async def test_volumes_have_records_revisions_and_locks(store: Store) -> None:
    data, other = volume("data"), volume("other", node="n2")
    lock = Lock(ResourceKind.VOLUME, "data", "op1")
    version = await store.apply([PutVolume(data, expect=0), PutVolume(other, expect=0), lock])
    past_version = await store.apply([PutVolumeRevision(volume_revision("data", number)) for number in (1, 2, 11)])
    assert await store.volume("data") == VolumeView(data, version, "op1")
    assert await store.volume("none") is None
    first = await store.volumes(page_size=1, page_token="")
    rest = await store.volumes(page_size=9, page_token=first.next_token)
    assert first.items == (VolumeView(data, version, "op1"),)
    assert rest.items == (VolumeView(other, version, ""),)
    past = await store.volume_revisions("uid-data", page_size=9, page_token="")
    assert [revision.revision for revision in past.items] == [1, 2, 11]
    # The lock of a container with the same name is another lock, and conditions change nothing.
    await store.apply(
        [
            RequireUnlocked(ResourceKind.CONTAINER, "data"),
            RequireVolumeVersion("data", version),
            PutRequest("r", _RECORD),
        ]
    )
    assert await store.volume("data") == VolumeView(data, version, "op1")
    for condition, found in (
        (RequireUnlocked(ResourceKind.VOLUME, "data"), "op1"),
        (RequireVolumeVersion("data", version - 1), Versioned(data, version)),
        (RequireVolumeVersion("none", version), None),
        (PutVolume(data, expect=0), Versioned(data, version)),
        (DeleteVolume("data", "uid-data", expect=0), Versioned(data, version)),
        (DeleteVolume("none", "uid-none", expect=version), None),
        (PutVolumeRevision(volume_revision("data", 2)), Versioned(volume_revision("data", 2), past_version)),
    ):
        assert await _refused(store, [condition, PutRequest("never", _RECORD)], by=0) == found
    assert await store.request("never") is None
    await store.apply([DeleteVolume("data", "uid-data", expect=version), Unlock(ResourceKind.VOLUME, "data", "op1")])
    assert await store.volume("data") is None
    assert not (await store.volume_revisions("uid-data", page_size=9, page_token="")).items


async def test_origins_of_images_are_written_and_deleted(store: Store) -> None:
    first = ImageOrigin(node="n", image_id="sha256:1", restricted=True, owners=("a",), update_time=now())
    other = ImageOrigin(node="n/m", image_id="sha256:1", committed_as="a:1", committed_for="b", update_time=now())
    await store.apply([PutImageOrigin(first), PutImageOrigin(other)])
    assert await store.image_origin("n", "sha256:1") == first
    assert await store.image_origin("n", "sha256:2") is None
    assert await store.image_origins("n") == (first,)
    changed = first.model_copy(update={"owners": ("a", "b")})
    await store.apply([PutImageOrigin(changed)])
    assert await store.image_origins("n") == (changed,)
    await store.apply([DeleteImageOrigin("n", "sha256:1"), DeleteImageOrigin("n", "sha256:2")])
    assert await store.image_origins("n") == ()
    assert await store.image_origins("n/m") == (other,)


async def test_records_are_replaced_and_deleted(store: Store) -> None:
    first = await store.apply(
        [
            Lock(ResourceKind.CONTAINER, "web", "op1"),
            PutContainer(container("web"), expect=0),
            PutRevision(revision("web", 1)),
            Claim("h1", GPU, holder("web", "op1")),
            Claim("h1", PORT, holder("web", "op1")),
            Claim("h1", GpuKey("GPU-2"), holder("other")),
            PutRequest("r1", _RECORD),
        ]
    )
    second = await store.apply(
        [
            PutContainer(container("web", generation=2), expect=first),
            ConfirmClaim("h1", GPU, holder("web")),
            ReleaseClaim("h1", PORT, "uid-web"),
            ReleaseClaim("h1", GpuKey("GPU-2"), "uid-web"),
            ReleaseClaim("h1", GpuKey("GPU-3"), "uid-web"),
            PutRequest("r1", _RECORD, ended=True),
            Unlock(ResourceKind.CONTAINER, "web", "op1"),
        ]
    )
    assert second > first
    assert await store.container("web") == ContainerView(container("web", generation=2), second, "")
    claims = {GPU: holder("web"), GpuKey("GPU-2"): holder("other")}
    assert dict((await store.claims("h1")).claims) == claims, "a claim of another holder was released"
    await store.apply([DeleteContainer("web", "uid-web", expect=second), ReleaseClaim("h1", GPU, "uid-web")])
    assert await store.container("web") is None
    assert await store.history("uid-web") == ()
    assert dict((await store.claims("h1")).claims) == {GpuKey("GPU-2"): holder("other")}
    assert await store.request("r1") == _RECORD


async def _refused(store: Store, changes: Sequence[StoreChange], by: int) -> object:
    """Return the value that the change at index `by` conflicted with."""
    with pytest.raises(StoreConflict) as conflict:
        await store.apply(changes)
    assert conflict.value.change == changes[by]
    return conflict.value.found


async def _everything(store: Store) -> list[object]:
    """Return everything that the store has of the objects of the next test."""
    return [
        *[await store.container(name) for name in ("web", "db")],
        *[await store.operation(name) for name in ("op1", "op2")],
        await store.history("uid-web"),
        dict((await store.claims("h1")).claims),
        *[await store.request(name) for name in ("r1", "r2")],
        set(await store.list_locks()),
    ]


async def test_a_failed_condition_is_reported_and_nothing_is_written(store: Store) -> None:
    version = await store.apply(
        [
            Lock(ResourceKind.CONTAINER, "web", "op1"),
            PutOperation(operation("op1"), expect=0),
            PutContainer(container("web"), expect=0),
            PutRevision(revision("web", 1)),
            Claim("h1", GPU, holder("web")),
            PutRequest("r1", _RECORD),
            Lock(ResourceKind.CONTAINER, "busy", "op9"),
            Claim("h1", GpuKey("GPU-9"), holder("web")),
        ]
    )
    before = await _everything(store)
    new = PutOperation(operation("op2"), expect=0)
    head, running = Versioned(container("web"), version), Versioned(operation("op1"), version)
    cases: list[tuple[StoreChange, object]] = [
        (Lock(ResourceKind.CONTAINER, "web", "op2"), "op1"),
        (Lock(ResourceKind.CONTAINER, "web", "op1"), "op1"),
        (Unlock(ResourceKind.CONTAINER, "web", "op2"), "op1"),
        (Unlock(ResourceKind.CONTAINER, "db", "op2"), None),
        (RequireUnlocked(ResourceKind.CONTAINER, "web"), "op1"),
        (Claim("h1", GPU, holder("db")), holder("web")),
        (Claim("h1", GPU, holder("web")), holder("web")),
        (ConfirmClaim("h1", GPU, holder("db")), holder("web")),
        (ConfirmClaim("h1", PORT, holder("db")), None),
        (PutContainer(container("web"), expect=0), head),
        (PutContainer(container("web"), expect=version - 1), head),
        (PutContainer(container("db"), expect=version), None),
        (DeleteContainer("web", "uid-web", expect=version - 1), head),
        (DeleteContainer("db", "uid-db", expect=version), None),
        (PutRevision(revision("web", 1)), Versioned(revision("web", 1), version)),
        (PutOperation(operation("op1"), expect=0), running),
        (PutOperation(operation("op1"), expect=version + 1), running),
        (PutRequest("r1", RequestRecord(operation_id="op2", digest="e")), Versioned(_RECORD, version)),
    ]
    locked = Lock(ResourceKind.CONTAINER, "busy", "op3")
    for change, found in cases:
        assert await _refused(store, [new, change, ReleaseClaim("h1", GpuKey("GPU-9"), "uid-web")], by=1) == found
        assert await _refused(store, [change, locked], by=0) == found, "another conflict was reported first"
    assert await _everything(store) == before


async def test_invalid_transactions_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="use the same key"):
        await store.apply([Lock(ResourceKind.CONTAINER, "web", "a"), Unlock(ResourceKind.CONTAINER, "web", "a")])
    with pytest.raises(ValueError, match="needs at least one change"):
        await store.apply([])
    assert await store.list_locks() == ()


async def test_names_with_separators_are_different_keys(store: Store) -> None:
    odd = GpuKey("MIG-GPU-1/2/3 %2F\u00fc")
    await store.apply([Claim("h/1", odd, holder("web")), Claim("h", odd, holder("db"))])
    assert dict((await store.claims("h/1")).claims) == {odd: holder("web")}
    assert dict((await store.claims("h")).claims) == {odd: holder("db")}


async def test_claimers_at_once_get_each_gpu_once(store: Store) -> None:
    async def claim(number: int) -> bool:
        name = f"c{number}"
        for turn in range(4):
            key = GpuKey(f"GPU-{(number + turn) % 4}")
            try:
                await store.apply([*begin_changes(name, name), Claim("h1", key, holder(name, name))])
            except StoreConflict as conflict:
                if not isinstance(conflict.change, Claim):
                    raise
            else:
                return True
        return False

    assert sum(await asyncio.gather(*(claim(number) for number in range(12)))) == 4
    assert len({each.uid for each in (await store.claims("h1")).claims.values()}) == 4
    assert len(await store.unfinished("n1")) == 4, "a refused transaction left an operation"


async def test_claims_are_confirmed_and_released_while_others_write_the_same_keys(store: Store) -> None:
    keys: list[ClaimKey] = [GpuKey(f"GPU-{number}") for number in range(4)]
    await store.apply([Claim("h1", key, holder("web")) for key in keys])

    async def confirm(number: int) -> None:
        for _ in range(10):
            await store.apply([ConfirmClaim("h1", key, holder("web", f"op{number}")) for key in keys])

    async with asyncio.timeout(limit(60)):
        await asyncio.gather(*(confirm(number) for number in range(5)))
    assert {each.uid for each in (await store.claims("h1")).claims.values()} == {"uid-web"}
    await asyncio.gather(*(store.apply([ReleaseClaim("h1", key, "uid-web") for key in keys]) for _ in range(5)))
    assert not (await store.claims("h1")).claims


# ---- operations, locks, requests ----


async def test_operations_are_listed_by_id_without_large_fields(store: Store) -> None:
    large = {name: operation(name).changed(arguments={"image": "x"}, result=container("web")) for name in "bca"}
    for each in large.values():
        await store.apply([PutOperation(each, expect=0)])
    listed = (await store.operations(page_size=9, page_token="")).items
    assert [each.id for each in listed] == ["a", "b", "c"]
    assert listed[0] == operation("a"), "a listed operation has arguments or a result"
    stored = await store.operation("a")
    assert stored is not None
    assert stored.value == large["a"]


async def test_an_ended_operation_keeps_its_result_and_not_its_arguments(store: Store) -> None:
    version = await store.apply([PutOperation(operation("op1", arguments={"image": "x"}), expect=0)])
    ended = operation(
        "op1", arguments={"image": "x"}, result=container("web"), state=OperationState.SUCCEEDED, end_time=EXAMPLE_TIME
    )
    version = await store.apply([PutOperation(ended, expect=version)])
    assert await store.operation("op1") == Versioned(ended.changed(arguments={}), version)


async def test_unfinished_operations_are_found_by_their_locks(store: Store) -> None:
    both = [Lock(kind, "web", "op1") for kind in ResourceKind]
    await store.apply([PutOperation(operation("op1"), expect=0), *both])
    await store.apply([PutOperation(operation("op2"), expect=0)])
    await store.apply(
        [
            PutOperation(operation("op3", state=OperationState.FAILED, end_time=EXAMPLE_TIME), expect=0),
            Lock(ResourceKind.CONTAINER, "c", "op3"),
        ]
    )
    await store.apply([PutOperation(operation("op4", node="n2"), expect=0), Lock(ResourceKind.CONTAINER, "d", "op4")])
    await store.apply([Lock(ResourceKind.CONTAINER, "e", "never recorded")])
    assert [stored.value.id for stored in await store.unfinished("n1")] == ["op1"], "listed once for each lock"
    assert [stored.value.id for stored in await store.unfinished("n2")] == ["op4"]
    assert {lock.operation_id for lock in await store.list_locks()} == {"op1", "op3", "op4", "never recorded"}
    await store.apply([Unlock(lock.kind, lock.name, lock.operation_id) for lock in await store.list_locks()])
    assert await store.list_locks() == ()


async def test_a_request_id_is_recorded_once_until_its_operation_has_ended(store: Store) -> None:
    other = RequestRecord(operation_id="op2", digest="e")
    version = await store.apply([PutRequest("r", _RECORD)])
    assert await _refused(store, [PutRequest("r", other)], by=0) == Versioned(_RECORD, version)
    await store.apply([PutRequest("r", other, ended=True)])
    assert await store.request("r") == other
    await store.apply([PutRequest("new", other, ended=True)])
    assert await store.request("new") == other


# ---- revisions and their snapshots ----

_SNAPSHOT = Snapshot(kind=SnapshotKind.TREE, image_id="sha256:1", create_time=EXAMPLE_TIME)


async def test_a_revision_has_its_snapshot_or_the_reason_for_none(store: Store) -> None:
    await store.apply([PutContainer(container("web"), expect=0), *(PutRevision(revision("web", n)) for n in (1, 2, 3))])
    await store.apply([PutSnapshot("uid-web", 1, _SNAPSHOT), PutSnapshot("uid-web", 2, SnapshotSkipped(reason="full"))])
    assert await store.history("uid-web") == (
        RevisionView(revision("web", 1), _SNAPSHOT),
        RevisionView(revision("web", 2), None, "full"),
        RevisionView(revision("web", 3), None),
    )
    await store.apply([PutSnapshot("uid-web", 2, _SNAPSHOT)])
    assert await store.revision("uid-web", 2) == RevisionView(revision("web", 2), _SNAPSHOT), "not the last one"


async def test_a_snapshot_written_before_its_revision_is_shown_with_it(store: Store) -> None:
    await store.apply([PutSnapshot("uid-web", 1, _SNAPSHOT)])
    assert await store.history("uid-web") == ()
    assert await store.revision("uid-web", 1) is None
    await store.apply([PutRevision(revision("web", 1))])
    assert await store.revision("uid-web", 1) == RevisionView(revision("web", 1), _SNAPSHOT)


async def test_a_deleted_revision_deletes_the_record_of_its_snapshot(store: Store) -> None:
    await store.apply([PutRevision(revision("web", 1)), PutRevision(revision("web", 11))])
    await store.apply([PutSnapshot("uid-web", 1, _SNAPSHOT), PutSnapshot("uid-web", 11, _SNAPSHOT)])
    for _ in range(2):
        await store.apply([DeleteRevision("uid-web", 1)])
        assert await store.history("uid-web") == (RevisionView(revision("web", 11), _SNAPSHOT),)
    await store.apply([PutRevision(revision("web", 1))])
    assert await store.revision("uid-web", 1) == RevisionView(revision("web", 1), None)


async def test_the_deletion_of_a_head_deletes_only_its_history(store: Store) -> None:
    heads = [PutContainer(container(name), expect=0) for name in ("web", "web2")]
    version = await store.apply([*heads, *(PutRevision(revision(name, 1)) for name in ("web", "web2"))])
    await store.apply([PutSnapshot("uid-web", 1, _SNAPSHOT), PutSnapshot("uid-web2", 1, _SNAPSHOT)])
    await store.apply([DeleteContainer("web", "uid-web", expect=version)])
    assert await store.history("uid-web") == ()
    assert await store.history("uid-web2") == (RevisionView(revision("web2", 1), _SNAPSHOT),)
    await store.apply([PutRevision(revision("web", 1))])
    assert await store.revision("uid-web", 1) == RevisionView(revision("web", 1), None)


# ---- pages ----


async def test_all_pages_show_the_state_at_the_first_while_others_write(store: Store) -> None:
    names = [f"c{number:02}" for number in range(25)]
    for name in names:
        await store.apply([*begin_changes(f"op-{name}", name), PutContainer(container(name), expect=0)])
    views: list[ContainerView] = []
    operations: list[Operation] = []
    token = operations_token = ""
    while True:
        page = await store.containers(page_size=10, page_token=token)
        views += page.items
        listed = await store.operations(page_size=10, page_token=operations_token)
        operations += listed.items
        # Between two pages, all remaining objects are changed, unlocked or deleted, from the last one on.
        for name in reversed(names[len(views) :]):
            view = await store.container(name)
            if view is not None:
                renamed = PutContainer(container(f"{name}x"), expect=0)
                await store.apply([DeleteContainer(name, view.container.uid, expect=view.version), renamed])
                await store.apply([Unlock(ResourceKind.CONTAINER, name, view.operation_id)])
        token, operations_token = page.next_token, listed.next_token
        if not token:
            break
    assert [view.container.name for view in views] == names
    assert [view.operation_id for view in views] == [f"op-{name}" for name in names]
    assert [each.target.name for each in operations] == names
    assert operations_token == ""
    later = await store.containers(page_size=100, page_token="")
    assert [view.container.name for view in later.items] == [*names[:10], *(f"{name}x" for name in names[10:])]


async def test_revisions_are_read_in_pages(store: Store) -> None:
    await store.apply([PutRevision(revision("web", number)) for number in (1, 2, 11)])
    await store.apply([PutVolumeRevision(volume_revision("web", number)) for number in (1, 2, 11)])
    first = await store.revisions("uid-web", page_size=2, page_token="")
    past = await store.volume_revisions("uid-web", page_size=2, page_token="")
    await store.apply([PutRevision(revision("web", 12)), PutSnapshot("uid-web", 11, _SNAPSHOT)])
    await store.apply([PutVolumeRevision(volume_revision("web", 12))])
    last = await store.revisions("uid-web", page_size=9, page_token=first.next_token)
    assert [*first.items, *last.items] == [RevisionView(revision("web", number), None) for number in (1, 2, 11)]
    assert last.next_token == ""
    last_past = await store.volume_revisions("uid-web", page_size=9, page_token=past.next_token)
    assert [revision.revision for revision in (*past.items, *last_past.items)] == [1, 2, 11]


async def test_a_full_last_page_has_no_token(store: Store) -> None:
    for name in ("a", "b"):
        await store.apply([PutContainer(container(name), expect=0)])
    page = await store.containers(page_size=2, page_token="")
    assert (len(page.items), page.next_token) == (2, "")


async def test_invalid_page_tokens_are_refused(store: Store) -> None:
    for name in ("a", "b", "c"):
        await store.apply([PutContainer(container(name), expect=0), PutOperation(operation(name), expect=0)])
        await store.apply([PutRevision(revision(name, 1)), PutRevision(revision(name, 2))])
    token = (await store.containers(page_size=1, page_token="")).next_token
    assert (await store.containers(page_size=2, page_token=token)).next_token == ""
    another_listing = (await store.operations(page_size=1, page_token="")).next_token
    another_history = (await store.revisions("uid-a", page_size=1, page_token="")).next_token
    for bad in ["x", "%%%", token[:-3], "W10", "e30", "bnVsbA", "\u00e9", "A" * 5000, another_listing, another_history]:
        with pytest.raises(InvalidArgument) as refused:
            await store.containers(page_size=1, page_token=bad)
        assert [violation.field for violation in refused.value.violations] == ["page_token"]
    with pytest.raises(InvalidArgument):
        await store.revisions("uid-b", page_size=1, page_token=another_history)


async def test_old_page_tokens_have_expired(store: Store, forget: Forget) -> None:
    for name in ("a", "b"):
        await store.apply([PutContainer(container(name), expect=0)])
    token = (await store.containers(page_size=1, page_token="")).next_token
    await forget()
    with pytest.raises(ResumeTokenExpired):
        await store.containers(page_size=1, page_token=token)
    assert len((await store.containers(page_size=9, page_token="")).items) == 2, "current records expired"
