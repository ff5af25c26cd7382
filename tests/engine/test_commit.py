"""CommitContainer: the content and config of the image, and its name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from gpudock.v1 import container_pb2, container_service_pb2, operation_pb2, operation_service_pb2

from tests.calls import IDLE, IMAGE, Caller, failure, progress_of, result_of
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.rig import CUDA_LIKE, Rig
from tests.rig.patience import limit

__all__ = ["daemons"]

NAME = "gpudock/committed:test"
REPOSITORY, TAG = NAME.split(":")
RUNNING = container_pb2.CONTAINER_STATE_RUNNING
PAUSED = container_pb2.CONTAINER_STATE_PAUSED
STAGE_RUNNING = operation_pb2.OPERATION_STAGE_STATE_RUNNING


@pytest.fixture(autouse=True)
def committed_images(rig: Rig) -> Iterator[None]:
    """Deletes the test's images, and asserts that no operation has left an intermediate image."""
    yield
    left = _tags(rig)
    rig.engine.remove_all()
    for tag in left:
        if tag.startswith(f"{REPOSITORY}:"):
            rig.engine.call("DELETE", f"/images/{tag}")
    assert not [tag for tag in left if tag.startswith(("gpudock/raw:", "gpudock/commit:"))]


def inspect_image(rig: Rig, image: str) -> dict[str, Any]:
    """Inspect an image, like `docker image inspect`."""
    config: dict[str, Any] = rig.engine.call("GET", f"/images/{image}/json")
    return config


def request(**fields: Any) -> container_service_pb2.CommitContainerRequest:
    """A CommitContainerRequest for container `box`, changed by `fields`."""
    return container_service_pb2.CommitContainerRequest(
        **{"name": "box", "repository": REPOSITORY, "tag": TAG, **fields}
    )


async def test_the_image_has_the_files_and_no_gpus_claims_or_labels_of_the_container(caller: Caller, rig: Rig) -> None:
    before = await caller.create(
        "box",
        2,
        image=CUDA_LIKE,
        env={"A": "1"},
        labels={"team": "x"},
        ports=[container_pb2.PortRequest(container_port=80)],
    )
    await caller.shell("box", "echo kept > /kept; rm /etc/group")
    progress = await progress_of(
        caller.containers.CommitContainer(
            request(author="me", comment="a note", changes=['CMD ["sh"]', "ENV B=2 PATH=$PATH:/opt", "LABEL v=1"])
        )
    )
    image = progress.result
    assert progress.stages == ["copy-files", "difference", "commit-files", "image", "tag", "commit", "clean"]
    assert (image.name, image.container, image.revision) == (NAME, "box", 1)
    made = inspect_image(rig, NAME)
    assert (made["Id"], made["Size"]) == (image.id, image.size_bytes)
    assert (made["Author"], made["Comment"]) == ("me", "a note")
    config, base = made["Config"], inspect_image(rig, CUDA_LIKE)["Config"]
    assert config["Labels"] == {**(base["Labels"] or {}), "team": "x", "v": "1"}
    path = next(line for line in base["Env"] if line.startswith("PATH="))
    # The variables of the base image that are about GPUs, and not those of the container.
    assert sorted(config["Env"]) == sorted(
        ["A=1", "B=2", f"{path}:/opt", *(line for line in base["Env"] if line != path)]
    )
    assert "NVIDIA_VISIBLE_DEVICES=all" in config["Env"]
    assert config["Cmd"] == ["sh"]
    assert "80/tcp" in config["ExposedPorts"]
    assert not config["Hostname"]
    for private in ("gpudock.", before.uid, before.status.gpu_uuids[0]):
        assert private not in str(config)

    after = await caller.get("box")
    assert (after.revision, after.etag, after.spec) == (before.revision, before.etag, before.spec)
    assert after.status.state == RUNNING
    assert after.status.engine_id == before.status.engine_id
    assert list(after.status.gpu_uuids) == list(before.status.gpu_uuids)

    # A container of the image has the files, and no GPU, name or claim of the committed container.
    other = await caller.create("other", 0, image=NAME, command=IDLE)
    assert await caller.shell("other", "cat /kept; ls /etc/group 2>/dev/null; ls /dev | grep -c nvidia || true") == (
        "kept\n0\n"
    )
    engine = rig.engine.call("GET", f"/containers/{other.status.engine_id}/json")
    assert engine["Config"]["Labels"]["gpudock.name"] == "other"
    assert engine["Config"]["Labels"]["gpudock.uid"] == other.uid
    bare = rig.engine.call("POST", "/containers/create", query={"name": "bare"}, send={"Image": NAME})["Id"]
    labels = rig.engine.call("GET", f"/containers/{bare}/json")["Config"]["Labels"]
    assert not [key for key in labels if key.startswith("gpudock.")]


@pytest.mark.parametrize(
    ("how", "stages"),
    [
        ("running", ["copy-files", "difference", "commit-files", "image", "tag", "commit", "clean"]),
        *(
            pytest.param(how, ["commit-files", "image", "tag", "commit", "clean"], marks=pytest.mark.deep)
            for how in ("not to be paused", "paused", "stopped")
        ),
    ],
)
async def test_a_commit_keeps_the_state_of_the_container(caller: Caller, how: str, stages: list[str]) -> None:
    await caller.create("box")
    await caller.shell("box", "echo kept > /kept")
    if how == "paused":
        await caller.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name="box"))
    elif how == "stopped":
        await caller.stop("box")
    state = (await caller.get("box")).status.state
    commit = request(pause=False) if how == "not to be paused" else request()
    progress = await progress_of(caller.containers.CommitContainer(commit))
    assert progress.stages == stages
    assert (await caller.get("box")).status.state == state
    await caller.create("other", image=NAME)
    assert await caller.shell("other", "cat /kept") == "kept\n"


async def test_a_second_commit_takes_the_name_and_a_repeated_request_id_commits_once(caller: Caller, rig: Rig) -> None:
    await caller.create("box")
    first = await caller.commit("box", REPOSITORY, tag=TAG)
    fields = {"tag": TAG, "request_id": "1b4e28ba-2fa1-41d2-883f-0016d3cca427"}
    second = await caller.commit("box", REPOSITORY, **fields)
    assert second.id != first.id
    assert inspect_image(rig, NAME)["Id"] == second.id
    # The old image still exists, without a name.
    assert inspect_image(rig, first.id)["RepoTags"] == []
    assert await caller.commit("box", REPOSITORY, **fields) == second
    listed = await caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest())
    newest = listed.operations[0]
    assert newest.kind == operation_pb2.OPERATION_KIND_COMMIT_CONTAINER
    stream = caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=newest.id))
    responses = [response async for response in stream]
    assert responses[-1].result.image == second
    rig.engine.call("DELETE", f"/images/{first.id}")


@pytest.mark.deep
async def test_a_cancelled_commit_leaves_the_name_with_the_old_image(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--reconcile-interval", "0.5")
    async with Caller(daemon.target) as caller:
        await caller.create("box")
        old = await caller.commit("box", REPOSITORY, tag=TAG)
        await caller.shell("box", "dd if=/dev/urandom of=/big bs=1M count=200 2>/dev/null")
        stream = caller.containers.CommitContainer(request())
        operation_id = ""
        async for response in stream:
            operation_id = response.operation.id
            if response.operation.stage == "commit-files" and response.operation.current_bytes:
                break
        await caller.operations.CancelOperation(operation_service_pb2.CancelOperationRequest(id=operation_id))
        cancelled = await failure(progress_of(stream))
        assert (cancelled.code, cancelled.reason) == (grpc.StatusCode.CANCELLED, "OPERATION_CANCELLED")
        assert inspect_image(rig, NAME)["Id"] == old.id
        assert (await caller.get("box")).status.state == RUNNING
        # The engine completes a commit that it has begun: its image appears later, and the daemon deletes it.
        async with asyncio.timeout(limit(120)):
            while f"gpudock/raw:{operation_id}" not in daemon.log_text:
                await asyncio.sleep(0.1)
            while f"gpudock/raw:{operation_id}" in _tags(rig):
                await asyncio.sleep(0.1)
        assert inspect_image(rig, NAME)["Id"] == old.id


def _tags(rig: Rig) -> list[str]:
    return [tag for image in rig.engine.call("GET", "/images/json") for tag in image["RepoTags"] or ()]


@pytest.mark.deep
async def test_the_progress_of_a_commit_is_in_bytes(caller: Caller) -> None:
    await caller.create("box")
    await caller.shell("box", "for n in 1 2 3 4 5 6; do dd if=/dev/urandom of=/big$n bs=1M count=100 2>/dev/null; done")
    progress = await progress_of(caller.containers.CommitContainer(request()))
    snapshots = [
        snapshot for snapshot in progress.snapshots if snapshot.stage == "commit-files" and snapshot.total_bytes
    ]
    written = [snapshot.current_bytes for snapshot in snapshots]
    assert written == sorted(written)
    assert {snapshot.total_bytes for snapshot in snapshots} == {written[-1]}
    assert written[-1] >= 600 << 20
    assert [count for count in written if 0 < count < written[-1]], "no progress between none and all bytes"


async def test_one_error_names_all_invalid_fields(caller: Caller) -> None:
    wrong = await failure(
        progress_of(
            caller.containers.CommitContainer(
                request(name="Box", repository="Upper", tag="-", changes=["RUN x", "CMD true"], request_id="x")
            )
        )
    )
    assert (wrong.code, wrong.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
    assert set(wrong.violations) == {"name", "repository", "tag", "changes[0]", "request_id"}


async def test_a_refused_commit_changes_nothing(caller: Caller, rig: Rig) -> None:
    missing = await failure(progress_of(caller.containers.CommitContainer(request())))
    assert (missing.code, missing.reason) == (grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND")
    await caller.create("box")
    stale = await failure(progress_of(caller.containers.CommitContainer(request(etag="old"))))
    assert (stale.code, stale.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    refused = await failure(progress_of(caller.containers.CommitContainer(request(changes=["ENV A='b"]))))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_REJECTED")
    assert (await caller.get("box")).status.state == RUNNING
    await caller.shell("box", "truncate -s $((8 << 40)) /huge")
    full = await failure(progress_of(caller.containers.CommitContainer(request())))
    assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert NAME not in _tags(rig)


async def test_the_plan_of_a_commit_has_its_bytes_and_warnings(caller: Caller, rig: Rig) -> None:
    await caller.create("box")
    await caller.shell("box", "dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null")
    planned = await progress_of(caller.containers.CommitContainer(request(validate_only=True)))
    (operation,) = planned.snapshots
    assert operation.plan.bytes_available > operation.plan.bytes_to_move > 20 << 20
    assert not operation.plan.restarts_process
    assert [line for line in operation.plan.warnings if "extended attributes" in line]
    assert not [line for line in operation.plan.warnings if "one more layer" in line]
    assert NAME not in _tags(rig)


async def test_a_transfer_by_commit_keeps_the_config_of_the_image(daemons: IsolatedDaemons, rig: Rig) -> None:
    """With the config of the container, a later revision could not remove a variable."""
    rig.images.derive(
        "gpudock/own:test", IMAGE, changes=["ENV A=image", 'CMD ["true"]', "LABEL l=image"], files={"f": b""}
    )
    daemon = await daemons.start("--layer-carry", "commit")
    async with Caller(daemon.target) as caller:
        await caller.create("box", 1, image="gpudock/own:test", env={"A": "1", "B": "2"}, labels={"m": "n"})
        await caller.shell("box", "echo kept > /kept")
        for gpus in (2, 0):
            scaled = await caller.scale("box", gpus)
            engine = rig.engine.call("GET", f"/containers/{scaled.status.engine_id}/json")
            committed, base = inspect_image(rig, engine["Image"]), inspect_image(rig, "gpudock/own:test")
            assert committed["Config"] == base["Config"]
            assert committed["RootFS"]["Layers"][: len(base["RootFS"]["Layers"])] == base["RootFS"]["Layers"]
            assert "A=1" in engine["Config"]["Env"]
            assert await caller.shell("box", "cat /kept; echo $A$B") == "kept\n12\n"
        await caller.delete("box")


@pytest.mark.deep
async def test_the_layers_of_repeated_transfers_by_commit_are_merged(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "commit")
    base = len(inspect_image(rig, IMAGE)["RootFS"]["Layers"])
    depths, before = [], set(_tags(rig))
    async with Caller(daemon.target) as caller:
        await caller.create("box", 1)
        for number in range(24):
            await caller.shell("box", f"echo {number} > /n{number}; rm -f /n{number - 2}")
            scaled = await caller.scale("box", 1 + number % 2, strategy=container_service_pb2.SCALE_STRATEGY_RECREATE)
            engine = rig.engine.call("GET", f"/containers/{scaled.status.engine_id}/json")
            depths.append(len(inspect_image(rig, engine["Image"])["RootFS"]["Layers"]) - base)
        assert depths == [*range(1, 21), 1, 2, 3, 4]
        assert await caller.shell("box", "cd /; ls -d n*; cat n22 n23") == "n22\nn23\n22\n23\n"
        await caller.delete("box")
    assert set(_tags(rig)) == before


# -- how long a container is frozen --------------------------------------------------------------------------------


@pytest.mark.deep
async def test_the_container_is_not_frozen_while_the_engine_writes_its_image(caller: Caller, rig: Rig) -> None:
    container = await caller.create("box")
    await caller.shell("box", "dd if=/dev/urandom of=/big bs=1M count=200 2>/dev/null; cp /big /other; rm /etc/group")
    frozen: set[bool] = set()
    stream = caller.containers.CommitContainer(request())
    async for response in stream:
        current, total = response.operation.current_bytes, response.operation.total_bytes
        if response.operation.stage == "commit-files" and 0 < current < total:
            state = rig.engine.call("GET", f"/containers/{container.status.engine_id}/json")["State"]
            frozen.add(state["Paused"])
    assert frozen == {False}
    assert len(rig.engine.call("GET", "/containers/json", query={"all": "1"})) == 1
    await caller.create("other", image=NAME)
    assert await caller.shell("other", "cmp /big /other && ls /etc/group 2>/dev/null || echo same") == "same\n"


@pytest.mark.deep
async def test_the_plan_warns_of_holes_that_the_image_will_not_have(caller: Caller, rig: Rig) -> None:
    await caller.create("box")
    plans = []
    for command in ("true", "truncate -s 100M /sparse; echo end >> /sparse"):
        await caller.shell("box", command)
        planned = await progress_of(caller.containers.CommitContainer(request(validate_only=True)))
        plans.append(planned.snapshots[0].plan)
    empty, sparse = plans
    assert sparse.apparent_bytes >= 100 << 20
    assert sparse.allocated_bytes < 10 << 20
    assert [line for line in sparse.warnings if "holes" in line and "100 MiB in the image" in line]
    assert not [line for line in empty.warnings if "holes" in line]
    # The freeze depends on the number of files and not on their size.
    assert sparse.expected_freeze.ToMilliseconds() - empty.expected_freeze.ToMilliseconds() < 10
    assert empty.expected_freeze.ToMilliseconds() > 0
    await caller.commit("box", REPOSITORY, tag=TAG)
    assert inspect_image(rig, NAME)["Size"] - inspect_image(rig, IMAGE)["Size"] >= 100 << 20
    await caller.create("other", image=NAME)
    assert await caller.shell("other", "tail -c 4 /sparse; stat -c %s /sparse") == f"end\n{(100 << 20) + 4}\n"


# -- names of images ---------------------------------------------------------------------------------------------------

BASE = "gpudock/committed:base"


@pytest.fixture
def base(rig: Rig) -> str:
    """An image that gpudock did not commit, as an operator or a pull leaves it."""
    rig.images.derive(BASE, IMAGE, changes=[], files={"base": b"base"})
    return str(inspect_image(rig, BASE)["Id"])


async def create_for_owner(caller: Caller, name: str, owner: str, **fields: Any) -> container_pb2.Container:
    """Create a container that belongs to `owner`."""
    request = container_service_pb2.CreateContainerRequest(name=name, owner=owner, spec=caller.spec(**fields))
    return await result_of(caller.containers.CreateContainer(request))


async def test_the_name_of_a_base_image_cannot_be_taken_over(caller: Caller, rig: Rig, base: str) -> None:
    await caller.create("box", image=BASE)
    await caller.shell("box", "echo planted > /planted")
    for replace in (False, True):
        for spelling in (REPOSITORY, f"docker.io/{REPOSITORY}"):
            for only_planned in (True, False):
                refused = await failure(
                    progress_of(
                        caller.containers.CommitContainer(
                            request(repository=spelling, tag="base", replace=replace, validate_only=only_planned)
                        )
                    )
                )
                assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "IMAGE_EXISTS")
                assert ("commit_replace forbids `replace` on this node" in refused.message) == replace
                assert "commit_replace" in refused.message
    assert inspect_image(rig, BASE)["Id"] == base
    await caller.create("other", image=BASE)
    assert await caller.shell("other", "ls /planted 2>/dev/null || true") == ""


async def test_a_name_is_replaced_for_the_same_owner_alone(caller: Caller, rig: Rig) -> None:
    await create_for_owner(caller, "box", "alice")
    first = await caller.commit("box", REPOSITORY, tag=TAG)
    await create_for_owner(caller, "other", "mallory")
    refused = await failure(progress_of(caller.containers.CommitContainer(request(name="other"))))
    assert refused.reason == "IMAGE_EXISTS"
    assert "it was not committed for owner 'mallory' under this name" in refused.message
    assert "alice" not in refused.message + str(refused.metadata)
    assert inspect_image(rig, NAME)["Id"] == first.id
    second = await caller.commit("box", REPOSITORY, tag=TAG)
    assert inspect_image(rig, NAME)["Id"] == second.id != first.id
    # The operator gives alice's image another name, under which gpudock did not commit it.
    rig.engine.call("POST", f"/images/{second.id}/tag", query={"repo": REPOSITORY, "tag": "base"})
    refused = await failure(progress_of(caller.containers.CommitContainer(request(tag="base"))))
    assert refused.reason == "IMAGE_EXISTS"
    rig.engine.call("DELETE", f"/images/{first.id}")


async def test_an_operator_allows_replacing_and_limits_names(daemons: IsolatedDaemons, rig: Rig, base: str) -> None:
    daemon = await daemons.start(
        "--commit-replace", "any", "--commit-repositories", f"gpudock/committed/{{owner}},{REPOSITORY}"
    )
    async with Caller(daemon.target) as caller:
        await create_for_owner(caller, "box", "alice")
        refused = await failure(progress_of(caller.containers.CommitContainer(request(tag="base"))))
        assert refused.reason == "IMAGE_EXISTS"
        assert inspect_image(rig, BASE)["Id"] == base
        made = await caller.commit("box", REPOSITORY, tag="base", replace=True)
        assert inspect_image(rig, BASE)["Id"] == made.id
        for repository in ("gpudock/committed-other", "gpudock", "docker.io/other"):
            forbidden = await failure(
                progress_of(caller.containers.CommitContainer(request(repository=repository, validate_only=True)))
            )
            assert (forbidden.code, forbidden.reason) == (grpc.StatusCode.PERMISSION_DENIED, "IMAGE_NAME_FORBIDDEN")
            assert forbidden.metadata["allowed"] == "gpudock/committed/alice,gpudock/committed"
        await caller.delete_all()
    rig.engine.call("DELETE", f"/images/{base}")


async def test_a_name_that_another_image_gets_during_a_commit_is_not_replaced(
    caller: Caller, rig: Rig, base: str
) -> None:
    """If an operator or a pull uses the name first, the commit is undone, and the other image keeps the name."""
    await caller.create("box")
    await caller.shell("box", "dd if=/dev/urandom of=/big bs=1M count=100 2>/dev/null")
    stream = caller.containers.CommitContainer(request())
    async for response in stream:
        if response.operation.stage == "commit-files":
            rig.engine.call("POST", f"/images/{base}/tag", query={"repo": REPOSITORY, "tag": TAG})
            break
    refused = await failure(progress_of(stream))
    assert refused.reason == "IMAGE_EXISTS"
    assert inspect_image(rig, NAME)["Id"] == base
