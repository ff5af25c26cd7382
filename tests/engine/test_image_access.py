"""Which owners may use an image that was pulled with credentials or committed for an owner on the same node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2, container_service_pb2, registry_auth_pb2

from tests.calls import IMAGE, Caller, failure, result_of
from tests.engine.docker_registry import SECRET, USER, registry_image
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.rig import Rig

__all__ = ["daemons"]

NEVER = container_service_pb2.PULL_POLICY_NEVER
ALWAYS = container_service_pb2.PULL_POLICY_ALWAYS
GOOD = registry_auth_pb2.RegistryAuth(username=USER, password=SECRET)
BAD = registry_auth_pb2.RegistryAuth(username=USER, password="wrong")  # noqa: S106 - no real password


@pytest_asyncio.fixture
async def private_image(rig: Rig, tmp_path: Path) -> AsyncIterator[str]:
    """The name of an image in a registry that demands credentials."""
    async with registry_image(rig, tmp_path, locked=True) as image:
        yield image


async def create_stopped(caller: Caller, owner: str, image: str, **fields: Any) -> container_pb2.Container:
    """Create a container of an owner without starting it, and delete it; returns the created container."""
    request = container_service_pb2.CreateContainerRequest(
        name=owner or "without-owner", owner=owner, spec=caller.spec(image=image), create_only=True, **fields
    )
    container = await result_of(caller.containers.CreateContainer(request))
    await caller.delete(container.name)
    return container


async def test_without_the_setting_every_owner_may_use_an_image_on_the_node(
    daemons: IsolatedDaemons, private_image: str
) -> None:
    async with Caller((await daemons.start()).target) as caller:
        assert (await failure(create_stopped(caller, "bob", private_image))).reason == "IMAGE_PULL_FAILED"
        await create_stopped(caller, "alice", private_image, registry_auth=GOOD)
        await create_stopped(caller, "bob", private_image)


@pytest.mark.deep
async def test_the_registry_is_queried_again_for_another_owner(
    daemons: IsolatedDaemons, rig: Rig, private_image: str
) -> None:
    daemon = await daemons.start("--verify-image-access", "true")
    async with Caller(daemon.target) as caller:
        await create_stopped(caller, "alice", private_image, registry_auth=GOOD)
        await create_stopped(caller, "alice", private_image)
        image_id = rig.engine.call("GET", f"/images/{private_image}/json")["Id"]
        for reference in (private_image, image_id, image_id.removeprefix("sha256:")[:12]):
            for owner in ("bob", ""):
                assert (await failure(create_stopped(caller, owner, reference))).reason == "IMAGE_PULL_FAILED"
                absent = await failure(create_stopped(caller, owner, reference, pull_policy=NEVER))
                assert absent.reason == "IMAGE_NOT_FOUND"
                assert set(absent.metadata) == {"image"}
        assert (
            await failure(create_stopped(caller, "bob", private_image, registry_auth=BAD))
        ).reason == "IMAGE_PULL_FAILED"
        await create_stopped(caller, "bob", private_image, registry_auth=GOOD)
        await create_stopped(caller, "bob", private_image, pull_policy=NEVER)
        # A failed pull gives access to no owner, and takes it from none.
        assert (
            await failure(create_stopped(caller, "carol", private_image, pull_policy=ALWAYS))
        ).reason == "IMAGE_PULL_FAILED"
        assert (
            await failure(create_stopped(caller, "carol", private_image, pull_policy=NEVER))
        ).reason == "IMAGE_NOT_FOUND"
        await create_stopped(caller, "alice", private_image, pull_policy=NEVER)

        # An update to the image needs access, too.
        await result_of(
            caller.containers.CreateContainer(
                container_service_pb2.CreateContainerRequest(name="carol", owner="carol", spec=caller.spec())
            )
        )
        for policy, reason in ((NEVER, "IMAGE_NOT_FOUND"), (0, "IMAGE_PULL_FAILED")):
            refused = await failure(
                caller.update(
                    "carol", image=private_image, files=container_service_pb2.FILES_POLICY_DISCARD, pull_policy=policy
                )
            )
            assert refused.reason == reason

    # The recorded access survives a restart of the daemon.
    await asyncio.to_thread(daemon.kill9)
    after = await daemons.start("--verify-image-access", "true", after=daemon)
    async with Caller(after.target) as caller:
        assert (
            await failure(create_stopped(caller, "dave", private_image, pull_policy=NEVER))
        ).reason == "IMAGE_NOT_FOUND"
        await create_stopped(caller, "alice", private_image, pull_policy=NEVER)


async def test_wrong_credentials_do_not_take_an_image_from_others(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--verify-image-access", "true")
    async with Caller(daemon.target) as caller:
        refused = await failure(create_stopped(caller, "mallory", IMAGE, pull_policy=ALWAYS, registry_auth=BAD))
        assert refused.reason == "IMAGE_PULL_FAILED"
        await create_stopped(caller, "alice", IMAGE, pull_policy=NEVER)


async def test_a_committed_image_is_usable_by_its_owner_alone(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--verify-image-access", "true", "--reconcile-interval", "0.3")
    name = "gpudock/accessed:test"
    async with Caller(daemon.target) as caller:
        request = container_service_pb2.CreateContainerRequest(name="box", owner="alice", spec=caller.spec())
        await result_of(caller.containers.CreateContainer(request))
        await caller.commit("box", "gpudock/accessed", tag="test")
        await create_stopped(caller, "alice", name, pull_policy=NEVER)
        assert (await failure(create_stopped(caller, "bob", name, pull_policy=NEVER))).reason == "IMAGE_NOT_FOUND"
        # A clone for another owner is refused.
        of_alice = container_service_pb2.CreateContainerRequest(
            name="hers", owner="alice", spec=caller.spec(image=name)
        )
        await result_of(caller.containers.CreateContainer(of_alice))
        assert (await failure(caller.clone("hers", "his", owner="bob"))).reason == "IMAGE_NOT_FOUND"
        await caller.clone("hers", "hers-too")
        await caller.delete_all()
    rig.engine.call("DELETE", f"/images/{name}")


async def test_an_error_names_no_other_image(caller: Caller) -> None:
    request = container_service_pb2.CreateContainerRequest(
        name="none", spec=caller.spec(image="gpudock/busybux:test"), pull_policy=NEVER
    )
    missing = await failure(result_of(caller.containers.CreateContainer(request)))
    assert missing.metadata == {"image": "gpudock/busybux:test"}
    assert IMAGE not in missing.message
