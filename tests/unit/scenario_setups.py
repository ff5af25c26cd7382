"""What a model node holds before a scenario's command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gpudock_server.core.containers.commands import FieldChange, Pause, Scale, Stop, Update
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.spec import GpuRequest, Mount

from tests.unit.model_node import SPEC, ModelNode

MIB = 1 << 20
DATA_MOUNT = Mount(volume="data", target="/data")
SPEC_WITH_DATA = SPEC.changed(mounts=(DATA_MOUNT,))

Setup = Callable[[ModelNode], Awaitable[None]]


async def empty_node(_: ModelNode) -> None:
    """No container and no volume."""


async def volume(model: ModelNode) -> None:
    """Volume `data` of 64 MiB."""
    await model.run_ok(volume_commands.Create("data", size_bytes=64 * MIB))


async def running_container(model: ModelNode) -> None:
    """Container `a` runs and has written a file."""
    await model.create_container()


async def scaled_container(model: ModelNode) -> None:
    """Container `a` at revision 2, with the file `later`; revision 1 has a snapshot tree without that file."""
    await model.create_container()
    await model.run_ok(Scale("a", gpus=GpuRequest(count=3)))
    model.engine.write(model.engine_id(), "later")


async def scaled_container_with_image_snapshot(model: ModelNode) -> None:
    """`scaled_container`, and the snapshot of revision 1 is an image."""
    model.layers.method = LayerTransferMethod.COMMIT
    await scaled_container(model)


async def stopped_container(model: ModelNode) -> None:
    """Container `a` is stopped and has no claims."""
    await model.create_container()
    await model.run_ok(Stop("a"))


async def paused_container(model: ModelNode) -> None:
    """Container `a` is paused."""
    await model.create_container()
    await model.run_ok(Pause("a"))


async def layers_with_different_quotas(model: ModelNode) -> None:
    """Layers cannot be exchanged, only copied."""
    await model.create_container()
    model.layers.same_quota = False


async def transfer_by_commit(model: ModelNode) -> None:
    """Layers are not accessible; files are transferred by docker commit."""
    await model.create_container()
    model.layers.method = LayerTransferMethod.COMMIT


async def one_transfer_by_commit_done(model: ModelNode) -> None:
    """Container `a` has the image of a transfer by commit, on which the next transfer is based."""
    await scaled_container_with_image_snapshot(model)


async def image_snapshots_only(model: ModelNode) -> None:
    """Snapshots can only be images."""
    await model.create_container()
    model.snapshots.method_result = (None, "no such filesystem")


async def history_at_its_limit(model: ModelNode) -> None:
    """Two revisions are kept, and there are two."""
    await model.create_container()
    model.configure_history(keep_revisions=2)
    await model.run_ok(Scale("a", gpus=GpuRequest(count=3)))


async def snapshot_on_stop(model: ModelNode) -> None:
    """A stop takes a snapshot."""
    await model.create_container()
    model.configure_history(on_stop=True)


async def mounted_volume(model: ModelNode) -> None:
    """Container `a` runs and mounts volume `data`."""
    await volume(model)
    await model.create_container(spec=SPEC_WITH_DATA)


async def mounted_volume_that_shrinks_by_copy(model: ModelNode) -> None:
    """`mounted_volume`, and the volume cannot shrink in place."""
    await mounted_volume(model)
    model.sized_volumes.copies = True


async def volume_of_stopped_container(model: ModelNode) -> None:
    """Container `a` mounts volume `data` and is stopped."""
    await mounted_volume(model)
    await model.run_ok(Stop("a"))


async def adoptable_engine_volume(model: ModelNode) -> None:
    """The engine has a volume with the label that permits adoption."""
    await model.engine.create_volume("theirs", labels={"gpudock.adopt": "true"}, driver_options={})


async def transfer_by_commits(model: ModelNode, times: int) -> int:
    """Transfer files by commit this many times; return the number of layers of the last image."""
    model.layers.method = LayerTransferMethod.COMMIT
    for number in range(times):
        model.engine.write(model.engine_id(), f"file {number}")
        await model.run_ok(Update("a", FieldChange("env", {"A": str(number)})))
    return len(model.engine.images[model.engine_container().image_id].layers)
