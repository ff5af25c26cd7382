"""Images of containers: pulled, committed to, flattened, and who has access to them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from gpudock_server.core.containers import images
from gpudock_server.core.containers.commands import (
    Create,
    FieldChange,
    FilesPolicy,
    PullPolicy,
    Rollback,
    Scale,
    Update,
)
from gpudock_server.core.containers.layer_images import MAX_LAYERS, MAX_LAYERS_ABOVE_BASE, needs_flattening
from gpudock_server.errors import (
    DiskFull,
    EngineRejected,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import RegistryAuth
from gpudock_server.model.operation import LayerTransferMethod, Operation, OperationState
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.ports import Progress

from tests.rig.patience import limit
from tests.unit.model_engine import IMAGE, OTHER_IMAGE, REMOTE_IMAGE
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_checks import FILES_OF_A
from tests.unit.scenario_setups import transfer_by_commits
from tests.unit.scenarios import THREE_GPUS

REJECTED = EngineRejected(call="work", status=500, detail="no")


pytestmark = pytest.mark.usefixtures("no_backoff")


def reason(operation: Operation) -> str:
    return operation.error.reason if operation.error else ""


async def test_a_missing_image_is_pulled_for_a_rollback_without_files() -> None:
    model = ModelNode()
    await model.create_container(spec=SPEC.changed(image=REMOTE_IMAGE))
    model.engine.containers.clear()
    del model.engine.images[model.engine.tags.pop(REMOTE_IMAGE)]
    model.store.put(model.container().with_status(state=ContainerState.FAILED))
    operation = await model.run_ok(Rollback("a", 1, spec_only=True))
    assert operation.stages[0].name == "pull"
    # A pull can take long: a shutdown cancels it, and a starting daemon does not wait for it.
    operation = operation.changed(arguments=model.store.arguments[operation.id])
    assert model.core.container_use_cases.saga_builders[operation.kind](operation).steps[0].interruptible is True
    assert model.files() == {"remote"}
    assert "will be pulled" in operation.plan.warnings[-1]


@pytest.mark.parametrize(
    ("layers", "base", "flattened"),
    [
        (MAX_LAYERS - 1, MAX_LAYERS - 2, False),
        (MAX_LAYERS, MAX_LAYERS - 1, True),
        (MAX_LAYERS_ABOVE_BASE + 1, 1, False),
        (MAX_LAYERS_ABOVE_BASE + 2, 1, True),
    ],
)
def test_when_an_image_is_flattened(layers: int, base: int, *, flattened: bool) -> None:
    assert needs_flattening(layers, base) is flattened


async def test_an_image_with_too_many_layers_is_flattened_onto_the_image_of_the_spec(model: ModelNode) -> None:
    model.configure_history(keep_revisions=2)
    assert await transfer_by_commits(model, MAX_LAYERS_ABOVE_BASE) == MAX_LAYERS_ABOVE_BASE + 1
    # A container that has written nothing adds no layer.
    model.engine.write(model.engine_id(), "last")
    await model.run_ok(Update("a", FieldChange("env", {"B": ""})))
    image = model.engine.images[model.engine_container().image_id]
    assert len(image.layers) == 2
    assert image.layers[0] == model.engine.images[model.engine.tags[IMAGE]].layers[0]
    assert image.config == IMAGE
    assert model.files() == FILES_OF_A | {"last"} | {f"file {number}" for number in range(MAX_LAYERS_ABOVE_BASE)}
    assert model.container().engine.base_depth == 1  # type: ignore[union-attr]  # the container has an engine container


async def test_an_image_that_cannot_be_flattened_keeps_its_layers(model: ModelNode) -> None:
    await transfer_by_commits(model, MAX_LAYERS_ABOVE_BASE)
    model.engine.write(model.engine_id(), "last")

    async def refused(*_: object, **__: object) -> str:
        raise DiskFull(path="/", needed_bytes=2, available_bytes=1)

    model.engine.flatten = refused  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Update("a", FieldChange("env", {"B": ""})))
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message.startswith(f"layers not flattened ({MAX_LAYERS_ABOVE_BASE + 2} layers): ")
    assert len(model.engine.images[model.engine_container().image_id].layers) == MAX_LAYERS_ABOVE_BASE + 2


async def test_a_transfer_keeps_the_config_of_the_container_if_the_engine_cannot_replace_it(model: ModelNode) -> None:
    model.layers.method = LayerTransferMethod.COMMIT

    async def refused(*_: object) -> str:
        raise REJECTED

    model.engine.replace_config = refused  # type: ignore[method-assign, assignment]
    operation = await model.run(Scale("a", gpus=THREE_GPUS))
    assert operation.state is OperationState.SUCCEEDED
    assert "keeps the container's environment and command" in operation.message
    assert model.files() == FILES_OF_A
    assert not [name for name in model.engine.tags if name.startswith("gpudock/raw")]


async def test_files_are_not_moved_to_another_image_without_their_base_image(model: ModelNode) -> None:
    head = model.container()
    assert head.engine is not None
    model.store.put(head.changed(engine=head.engine.model_copy(update={"base_image_id": "sha256:gone"})))
    operation = await model.run(Update("a", FieldChange("image", OTHER_IMAGE), files=FilesPolicy.CARRY_COMMIT))
    assert operation.error is not None
    assert operation.error.metadata["detail"] == "the base image of its layer is no longer in the engine"


async def test_a_stalled_pull_fails_with_the_time_of_its_last_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_STALL_NOTICE_SECONDS", 0.02)
    model = ModelNode()

    async def stuck(_name: str, _auth: RegistryAuth | None, progress: Progress) -> None:
        progress(1, 2)
        await asyncio.Event().wait()

    model.engine.pull = stuck  # type: ignore[method-assign, assignment]
    seconds = limit(0.2)
    command = Create("a", ContainerSpec(image=REMOTE_IMAGE), pull_stall_seconds=seconds)
    operation_id = await model.begin(command)
    messages = {view.message async for view in model.operations.watch(operation_id)}
    assert [
        text for text in messages if text.startswith("pull stalled since") and f"it fails after {seconds:g} s" in text
    ]
    operation = await model.ended_operation(operation_id)
    assert operation.error is not None
    assert operation.error.reason == "IMAGE_PULL_FAILED"
    assert operation.error.metadata["image"] == REMOTE_IMAGE
    assert operation.error.metadata["detail"].startswith(f"no progress for {seconds:g} s (last at ")
    assert operation.stages[0].name == "pull"


async def test_an_image_that_a_pull_does_not_bring_is_not_found() -> None:
    model = ModelNode()

    async def empty(*_: object) -> None:
        return

    model.engine.pull = empty  # type: ignore[method-assign, assignment]
    operation = await model.run(Create("a", ContainerSpec(image=REMOTE_IMAGE)))
    assert operation.error is not None
    assert (operation.error.reason, operation.error.metadata) == ("IMAGE_NOT_FOUND", {"image": REMOTE_IMAGE})


async def test_an_image_pulled_with_credentials_is_for_the_owners_who_sent_some() -> None:
    model, auth = ModelNode(), RegistryAuth(username="u", password="p")  # noqa: S106 - no real password
    spec = ContainerSpec(image=REMOTE_IMAGE)
    sent: list[RegistryAuth | None] = []
    pull = model.engine.pull

    async def record_auth(reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        sent.append(auth)
        await pull(reference, auth, progress)

    model.engine.pull = record_auth  # type: ignore[method-assign]  # this call alone differs
    await model.run_ok(Create("a", spec, owner="alice", registry_auth=auth))
    origin = model.store.origins["gpu1", "sha256:remote"]
    assert (origin.restricted, origin.owners) == (True, ("alice",))
    await model.run_ok(Create("b", spec, owner="bob", pull_policy=PullPolicy.ALWAYS))
    origin = model.store.origins["gpu1", "sha256:remote"]
    assert (origin.restricted, origin.owners) == (True, ("alice", "bob"))
    await model.run_ok(Create("c", spec, owner="bob", registry_auth=auth, pull_policy=PullPolicy.ALWAYS))
    assert model.store.origins["gpu1", "sha256:remote"] == origin
    assert sent == [auth, None, auth]


async def test_an_image_pulled_by_an_undone_operation_is_for_no_owner() -> None:
    model, auth = ModelNode(), RegistryAuth(identity_token="t")  # noqa: S106 - no real password

    async def refused(_: object) -> str:
        raise REJECTED

    model.engine.create = refused  # type: ignore[method-assign, assignment]
    spec = ContainerSpec(image=REMOTE_IMAGE)
    assert reason(await model.run(Create("a", spec, owner="alice", registry_auth=auth))) == "ENGINE_REJECTED"
    origin = model.store.origins["gpu1", "sha256:remote"]
    assert origin.restricted
    model.store.origins.clear()
    # An image pulled without credentials, or present before, is not restricted.
    for image in (REMOTE_IMAGE, IMAGE):
        command = Create("a", ContainerSpec(image=image), pull_policy=PullPolicy.ALWAYS, registry_auth=None)
        model.engine.registry[IMAGE] = model.engine.images[model.engine.tags[IMAGE]]
        assert reason(await model.run(command)) == "ENGINE_REJECTED"
        assert reason(await model.run(replace(command, registry_auth=auth))) == "ENGINE_REJECTED"
    assert not model.store.origins
