"""Images of a container's files, and the limit of their layers.

Each transfer by commit adds a layer to the image that the user named, and engines support at most 125. The layers above
the user's image are flattened into one before that limit, and before reading files through many layers gets slow.

These images keep the config of the user's image. The engine's commit would write the container's environment and
command into it, so that values which a later change of the spec removes would return.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpudock_server.core.operations.saga import OperationRun, StepResult
from gpudock_server.errors import DiskFull, EngineRejected, LayerCarryFailed
from gpudock_server.model.container import EngineBinding
from gpudock_server.model.engine import LABEL_OPERATION, LABEL_UID, EngineImage
from gpudock_server.model.operation import Operation
from gpudock_server.model.record import Record
from gpudock_server.ports import Engine, LayerStore

# Layers in all, and layers above the user's image, from which an image is flattened. Flattening writes all files of the
# upper layers again, so it is not done each time.
MAX_LAYERS = 100
MAX_LAYERS_ABOVE_BASE = 20


class LayerImage(Record):
    """The result of a step that creates an image of a container's files.

    `base_depth`: how many of its lowest layers are those of the user's image. 0: unknown. None: recorded by an older
    version, which did not count them.
    """

    image_id: str
    reference: str = ""
    base_depth: int | None = None


class GraftedImage(Record):
    """The result of a step that creates an image of a container's files on another image."""

    image_id: str
    reference: str


LAYER_IMAGE = StepResult("snapshot", LayerImage)
GRAFTED = StepResult("graft", GraftedImage)


def layer_image_name(operation: Operation) -> str:
    """The name of an operation's layer image; unique, so that a resumed operation finds the image again."""
    return layer_image_name_of(operation.id)


def layer_image_name_of(operation_id: str) -> str:
    """`layer_image_name` by the id of the operation."""
    return f"gpudock/layer:{operation_id}"


def raw_image_name(operation: Operation) -> str:
    """The temporary name of the image that the engine's commit creates."""
    return f"gpudock/raw:{operation.id}"


def grafted_image_name(operation: Operation) -> str:
    """The name of the image of a container's files on another image."""
    return f"gpudock/layer:{operation.id}-graft"


@dataclass(frozen=True, slots=True)
class LayerImages:
    """Creates images of the files of engine containers."""

    engine: Engine
    layers: LayerStore

    async def make(self, run: OperationRun, old: EngineBinding) -> LayerImage:
        """Create an image of the files of a stopped engine container. Idempotent."""
        engine, reference = self.engine, layer_image_name(run.operation)
        depth = await self.base_depth(old)
        image = await engine.image(reference)
        if image is None:
            raw = await self.commit_raw(run.operation, old.engine_id)
            await self._name_raw(run, raw, (old.image_id, depth))
            await engine.remove_image(raw_image_name(run.operation))
            image = await engine.image(reference)
        if image is None:
            detail = f"the engine committed {reference} but does not list it"
            raise LayerCarryFailed(method="COMMIT", detail=detail)
        return LayerImage(image_id=image.id, reference=reference, base_depth=depth)

    async def graft(self, operation: Operation, *, layer_image_id: str, onto: str) -> str:
        """Put the layers of an image above the user's image on the image `onto`, as one layer. Idempotent.

        Returns the id of the new image, or `onto` if there are no such layers.
        """
        grafted = await self.engine.image(grafted_image_name(operation))
        if grafted is not None:
            return grafted.id
        depth = LAYER_IMAGE.of(operation).base_depth
        if not depth:
            raise LayerCarryFailed(method="COMMIT", detail="the base image of its layer is no longer in the engine")
        image = await self.engine.image(layer_image_id)
        if image is not None and len(image.layers) == depth:
            # The engine's commit creates no layer for a container that has written nothing.
            await self.engine.tag(onto, grafted_image_name(operation))
            return onto
        return await self.engine.flatten(
            layer_image_id, depth, grafted_image_name(operation), config_of=onto, onto=onto
        )

    async def remove(self, operation: Operation) -> None:
        """Remove the image that `make` created, and the temporary one."""
        for reference in (layer_image_name(operation), raw_image_name(operation)):
            await self.engine.remove_image(reference)

    async def base_depth(self, binding: EngineBinding) -> int:
        """How many layers of a container's image are those of the image that the user named; 0: unknown."""
        if binding.base_depth:
            return binding.base_depth
        base = await self.engine.image(binding.user_image_id)
        current = await self.engine.image(binding.image_id)
        if base is None or current is None or current.layers[: len(base.layers)] != base.layers:
            return 0
        return len(base.layers)

    async def commit_raw(self, operation: Operation, engine_id: str) -> EngineImage:
        """Commit an engine container, which must not write to its files meanwhile; the first half of `make`."""
        reference = raw_image_name(operation)
        if (image := await self.engine.image(reference)) is not None:
            return image
        if (engine_container := await self.engine.inspect(engine_id)) is not None:
            await self.layers.require_committable(engine_container)
        labels = {LABEL_UID: operation.target.uid, LABEL_OPERATION: operation.id}
        await self.engine.commit(engine_id, reference, labels)
        image = await self.engine.image(reference)
        if image is None:
            detail = f"the engine committed {reference} but does not list it"
            raise LayerCarryFailed(method="COMMIT", detail=detail)
        return image

    async def _name_raw(self, run: OperationRun, raw: EngineImage, old: tuple[str, int]) -> None:
        """Name the committed image, restore the config of its base image, and flatten it if it has many layers."""
        (image_id, depth), reference = old, layer_image_name(run.operation)
        if 0 < depth < len(raw.layers) and needs_flattening(len(raw.layers), depth):
            try:
                await self.engine.flatten(raw.id, depth, reference, config_of=image_id)
            except (DiskFull, EngineRejected, LayerCarryFailed) as error:
                # The image can keep its layers for now; the next transfer tries again.
                run.add_message(f"layers not flattened ({len(raw.layers)} layers): {error}")
            else:
                return
        try:
            await self.engine.replace_config(raw.id, image_id, reference)
        except EngineRejected as error:
            # An engine with the containerd image store does not load an image without its layers.
            run.add_message(f"the layer image keeps the container's environment and command: {error}")
            await self.engine.tag(raw.id, reference)


def needs_flattening(layers: int, base: int) -> bool:
    """Whether to flatten an image with this number of layers, of which the lowest `base` are the user's image."""
    return layers >= MAX_LAYERS or layers - base > MAX_LAYERS_ABOVE_BASE
