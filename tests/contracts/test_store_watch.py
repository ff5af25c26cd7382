"""ports.Store: watches of containers and volumes deliver every change once and in order, from any token."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest
from gpudock_server.errors import InvalidArgument, ResumeTokenExpired
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Mount
from gpudock_server.model.store_changes import (
    Claim,
    Lock,
    PutContainer,
    PutOperation,
    PutVolume,
    StoreChange,
    Unlock,
)
from gpudock_server.ports import Store, StoreEvent, VolumeDetails

from tests.contracts.store_examples import SOON, Forget, delete, put, text, watching
from tests.engine.etcd_examples import GPU, container, holder, operation, volume
from tests.rig.patience import limit

pytest_plugins = ["tests.contracts.store_fixtures"]

# These tests leave out events of idle watches and slow readers, which MemoryStore does not have
# (tests/engine/test_etcd_watch.py).
NOT_FAKED: dict[str, dict[str, str]] = {}


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


async def test_a_watch_sends_the_list_and_then_every_change_with_its_lock(store: Store) -> None:
    await put(store, "a", 1)
    await put(store, "b", 1, Lock(ResourceKind.CONTAINER, "b", "op1"))
    async with watching(store) as reader:
        assert await reader.next_changes(2) == [("", "a.1"), ("", "b.1 op1")]
        complete = await reader.next_event()
        assert complete.list_complete
        assert complete.before is complete.after is None
        await put(store, "c", 1, Lock(ResourceKind.CONTAINER, "c", "op2"), PutOperation(operation("op2"), expect=0))
        # A change of a lock without its container is sent; a claim, and a lock of a missing container, are not.
        await store.apply([Unlock(ResourceKind.CONTAINER, "b", "op1"), Claim("h1", GPU, holder("b"))])
        await store.apply([Lock(ResourceKind.CONTAINER, "missing", "op3")])
        # Two objects in one transaction.
        a, b = await store.container("a"), await store.container("b")
        assert a is not None
        assert b is not None
        await store.apply(
            [
                PutContainer(container("b", generation=2), expect=b.version),
                PutContainer(container("a", generation=2), expect=a.version),
                Lock(ResourceKind.CONTAINER, "a", "op4"),
            ]
        )
        await delete(store, "a", Unlock(ResourceKind.CONTAINER, "a", "op4"))
        await put(store, "a", 3)
        assert await reader.next_changes(6) == [
            ("", "c.1 op2"),
            ("b.1 op1", "b.1"),
            ("a.1", "a.2 op4"),
            ("b.1", "b.2"),
            ("a.2 op4", ""),
            ("", "a.3"),
        ]
    # The list equals the sum of the changes.
    page = await store.containers(page_size=10, page_token="")
    assert [text(view) for view in page.items] == ["a.3", "b.2", "c.1 op2"]


async def test_a_watch_resumes_after_the_event_of_its_token(store: Store) -> None:
    for name in ("a", "b", "c"):
        await put(store, name, 1)
    heads = [await store.container(name) for name in ("a", "b", "c")]
    async with watching(store) as reader:
        events = [await reader.next_event() for _ in range(2)]
        await put(store, "d", 1)
        await store.apply(
            [PutContainer(container(head.container.name, generation=2), expect=head.version) for head in heads if head]
        )
        await delete(store, "d")
        events += [await reader.next_event() for _ in range(7)]
    changes = [(text(event.before), text(event.after)) for event in events]
    assert changes == [
        ("", "a.1"),
        ("", "b.1"),
        ("", "c.1"),
        ("", ""),
        ("", "d.1"),
        ("a.1", "a.2"),
        ("b.1", "b.2"),
        ("c.1", "c.2"),
        ("d.1", ""),
    ]
    for number, event in enumerate(events):
        async with watching(store, event.token) as reader:
            rest = [change for change in changes[number + 1 :] if change != ("", "")]
            assert await reader.next_changes(len(rest)) == rest, f"after event {number}"


async def test_no_change_is_lost_between_a_list_and_the_watch_after_it(store: Store) -> None:
    for number in range(120):
        await put(store, f"c{number:03d}", 1)
    pages = [await store.containers(page_size=60, page_token="")]
    await put(store, "c000", 2)
    pages.append(await store.containers(page_size=60, page_token=pages[0].next_token))
    assert pages[0].watch_token == pages[1].watch_token
    async with watching(store, pages[1].watch_token) as reader:
        checkpoint = await reader.next_event()
        assert (checkpoint.before, checkpoint.after, checkpoint.list_complete) == (None, None, False)
        assert await reader.next_changes(1) == [("c000.1", "c000.2")]
    async with watching(store) as reader:
        # The list is longer than a page of the watch; a change during the list is sent after it.
        first = await reader.next_changes(10)
        await put(store, "c119", 2)
        rest = await reader.next_changes(111)
        assert [*first, *rest] == [
            *[("", f"c{number:03d}.{2 if number == 0 else 1}") for number in range(120)],
            ("c119.1", "c119.2"),
        ]


async def test_a_watch_without_a_list_sends_only_later_changes(store: Store) -> None:
    await put(store, "a", 1)
    async with watching(store, listing=False) as reader:
        checkpoint = await reader.next_event()
        assert (checkpoint.before, checkpoint.after, checkpoint.list_complete) == (None, None, False)
        await put(store, "a", 2)
        assert await reader.next_changes(1) == [("a.1", "a.2")]


async def test_concurrent_watches_each_receive_every_change(store: Store) -> None:
    async with watching(store) as first, watching(store) as second:
        for reader in (first, second):
            assert (await reader.next_event()).list_complete
        await put(store, "a", 1)
        assert await first.next_changes(1) == await second.next_changes(1) == [("", "a.1")]


async def test_a_cancelled_watch_can_be_resumed_from_its_last_token(store: Store) -> None:
    async with watching(store, listing=False) as reader:
        await reader.next_event()
        waiting = asyncio.ensure_future(reader.next_event())
        await asyncio.wait({waiting}, timeout=0.05)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
    await put(store, "a", 1)
    async with watching(store, reader.token) as resumed:
        assert await resumed.next_changes(1) == [("", "a.1")]


async def test_an_invalid_token_or_a_token_of_another_kind_is_refused(store: Store) -> None:
    await put(store, "a", 1)
    async with watching(store) as reader:
        valid = (await reader.next_event()).token
    of_volumes = (await store.volumes(page_size=1, page_token="")).watch_token
    for token in ("x", "W10", valid[:-4], "é" * 3, of_volumes):
        with pytest.raises(InvalidArgument) as refused:
            async with watching(store, token) as reader:
                await reader.next_event()
        assert refused.value.violations[0].field == "resume_token"


async def test_a_token_older_than_the_history_has_expired(store: Store, forget: Forget) -> None:
    await put(store, "a", 1)
    async with watching(store) as reader:
        tokens = [(await reader.next_event()).token for _ in range(2)]
    await put(store, "a", 2)
    await forget()
    for token in tokens:
        with pytest.raises(ResumeTokenExpired):
            async with watching(store, token) as reader:
                await reader.next_changes(1)
    async with watching(store) as reader:
        assert await reader.next_changes(1) == [("", "a.2")], "a current record is missing"


async def test_a_watch_of_volumes_sends_their_containers_from_any_token_on(store: Store) -> None:
    generator = random.Random(7)  # noqa: S311 - the same changes in every run, no secret
    names = ("a", "b", "c")
    for name in names[:2]:
        await store.apply([PutVolume(volume(name), expect=0)])
    before = await store.volumes(page_size=10, page_token="")
    mounted: dict[str, tuple[str, ...]] = {}
    for number in range(80):
        name = generator.choice(("x", "y", "z"))
        others: list[StoreChange] = []
        if number == 40:
            others = [PutVolume(volume("c"), expect=0), Lock(ResourceKind.VOLUME, "a", "op1")]
        if name in mounted and generator.random() < 0.3:
            del mounted[name]
            await delete(store, name, *others)
            continue
        # Most puts change the mounts, some do not.
        mounted[name] = tuple(generator.sample(names, generator.randrange(4)))
        mounts = tuple(Mount(volume=volume_name, target=f"/{volume_name}") for volume_name in mounted[name])
        await put(store, name, number + 1, *others, spec=container(name).spec.changed(mounts=mounts))
    after = {view.volume.name for view in (await store.volumes(page_size=10, page_token="")).items}
    expected = {name: tuple(sorted(user for user in mounted if name in mounted[user])) for name in after}

    async def read_changes(token: str) -> tuple[list[StoreEvent[VolumeDetails]], dict[str, tuple[str, ...]]]:
        """The changes from a token to a lock that this function puts, and the containers of each volume after them."""
        await store.apply([Lock(ResourceKind.VOLUME, "b", "op2")])
        events, containers = [], {}
        async with aclosing(store.watch_volumes(token=token, listing=False)) as watch:
            async with asyncio.timeout(limit(SOON)):
                async for event in watch:
                    if event.after is not None:
                        assert event.before != event.after, "an event changes nothing"
                        events.append(event)
                        containers[event.after.view.volume.name] = event.after.containers
                        if event.after.view.operation_id == "op2":
                            break
        await store.apply([Unlock(ResourceKind.VOLUME, "b", "op2")])
        return events, containers

    events, containers = await read_changes(before.watch_token)
    assert containers == expected
    changes = [(event.before, event.after) for event in events]
    for index in range(0, len(events) - 1, 7):
        rest, _ = await read_changes(events[index].token)
        assert [(event.before, event.after) for event in rest][: len(changes) - index - 1] == changes[index + 1 :]


async def test_a_watch_of_volumes_begins_with_the_list_and_its_containers(store: Store) -> None:
    mounts = (Mount(volume="data", target="/data"),)
    await store.apply([PutVolume(volume("data"), expect=0), Lock(ResourceKind.VOLUME, "data", "op1")])
    await put(store, "web", 1, spec=container("web").spec.changed(mounts=mounts))
    async with aclosing(store.watch_volumes(token="", listing=True)) as watch, asyncio.timeout(limit(SOON)):
        listed = await anext(watch)
        assert listed.after is not None
        assert (listed.after.view.operation_id, listed.after.containers) == ("op1", ("web",))
        assert (await anext(watch)).list_complete
        await delete(store, "web")
        changed = await anext(watch)
        assert changed.after is not None
        assert changed.after.containers == ()
