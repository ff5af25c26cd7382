"""A container's files as an image, and how deep the images get that are made so.

Each carry by commit lays one more layer on the image that the user named, and engines stop at 125. Before that, and
before a container's files are read through too many layers, those above the user's image are made one.

What is carried keeps the config of the user's image: the engine's commit would write the container's own variables and
command into it, and what a later change of the spec takes away would come back.
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

# Layers in all, and layers above the user's image, from which on those above are made one. A squash writes all of them
# again, so it is not done each time.
MAX_LAYERS = 100
MAX_LAYERS_ABOVE_BASE = 20


class LayerImage(Record):
    """An image of a container's files, as a step's result.

    `base_depth` is the number of its lowest layers that are the user's image's; 0 is unknown, and None, in what an
    older version recorded, not counted.
    """

    image_id: str
    reference: str = ""
    base_depth: int | None = None


class GraftedImage(Record):
    """An image that has a container's files on top of another image, as a step's result."""

    image_id: str
    reference: str


LAYER_IMAGE = StepResult("snapshot", LayerImage)
GRAFTED = StepResult("graft", GraftedImage)


def layer_image_name(operation: Operation) -> str:
    """The name of the image that an operation carries a layer in: unique to it, so that it can be found again."""
    return layer_image_name_of(operation.id)


def layer_image_name_of(operation_id: str) -> str:
    """`layer_image_name`, where only the id of the operation is left."""
    return f"gpudock/layer:{operation_id}"


def raw_image_name(operation: Operation) -> str:
    """The name of the image that the engine's commit makes, for as long as it is worked on."""
    return f"gpudock/raw:{operation.id}"


def grafted_image_name(operation: Operation) -> str:
    """The name of the image that has a container's files on top of another image."""
    return f"gpudock/layer:{operation.id}-graft"


@dataclass(frozen=True, slots=True)
class LayerImages:
    """Makes images of the files of engine containers."""

    engine: Engine
    layers: LayerStore

    async def make(self, run: OperationRun, old: EngineBinding) -> LayerImage:
        """Make an image of the files of an engine container that does not run. Done twice is done once."""
        engine, reference = self.engine, layer_image_name(run.operation)
        depth = await self.base_depth(old)
        made = await engine.image(reference)
        if made is None:
            raw = await self.commit_raw(run.operation, old.engine_id)
            await self._name_raw(run, raw, (old.image_id, depth))
            await engine.remove_image(raw_image_name(run.operation))
            made = await engine.image(reference)
        if made is None:
            raise LayerCarryFailed(method="COMMIT", detail=f"the engine made {reference}, and has none")
        return LayerImage(image_id=made.id, reference=reference, base_depth=depth)

    async def graft(self, operation: Operation, *, carried: str, onto: str) -> str:
        """Lay what `carried` has above the user's image on another image, as one layer; the id of what comes of it.

        `onto` is that image's id, which is the result where `carried` has nothing above. Done twice is done once.
        """
        made = await self.engine.image(grafted_image_name(operation))
        if made is not None:
            return made.id
        depth = LAYER_IMAGE.of(operation).base_depth
        if not depth:
            raise LayerCarryFailed(
                method="COMMIT", detail="the image that its files were written on is no longer there"
            )
        above = await self.engine.image(carried)
        if above is not None and len(above.layers) == depth:
            # The engine's commit makes no layer of a container that has written nothing.
            await self.engine.tag(onto, grafted_image_name(operation))
            return onto
        return await self.engine.flatten(carried, depth, grafted_image_name(operation), config_of=onto, onto=onto)

    async def remove(self, operation: Operation) -> None:
        """Remove what `make` made, or began to."""
        for reference in (layer_image_name(operation), raw_image_name(operation)):
            await self.engine.remove_image(reference)

    async def base_depth(self, binding: EngineBinding) -> int:
        """How many of the layers that a container stands on are those of the image that the user named; 0: unknown."""
        if binding.base_depth:
            return binding.base_depth
        base = await self.engine.image(binding.user_image_id)
        current = await self.engine.image(binding.image_id)
        if base is None or current is None or current.layers[: len(base.layers)] != base.layers:
            return 0
        return len(base.layers)

    async def commit_raw(self, operation: Operation, engine_id: str) -> EngineImage:
        """The first half of `make`, and the only one for which an engine container has to be still."""
        reference = raw_image_name(operation)
        if (made := await self.engine.image(reference)) is not None:
            return made
        if (seen := await self.engine.inspect(engine_id)) is not None:
            await self.layers.require_committable(seen)
        labels = {LABEL_UID: operation.target.uid, LABEL_OPERATION: operation.id}
        await self.engine.commit(engine_id, reference, labels)
        made = await self.engine.image(reference)
        if made is None:
            raise LayerCarryFailed(method="COMMIT", detail=f"the engine made {reference}, and has none")
        return made

    async def _name_raw(self, run: OperationRun, raw: EngineImage, old: tuple[str, int]) -> None:
        """Give what was committed its name, the config of the image it came from, and fewer layers if it has many."""
        (image_id, depth), reference = old, layer_image_name(run.operation)
        if 0 < depth < len(raw.layers) and needs_flattening(len(raw.layers), depth):
            try:
                await self.engine.flatten(raw.id, depth, reference, config_of=image_id)
            except (DiskFull, EngineRejected, LayerCarryFailed) as error:
                # It can be as deep as it is for a while; the next carry tries again.
                run.add_message(f"its {len(raw.layers)} layers were not made fewer: {error}")
            else:
                return
        try:
            await self.engine.replace_config(raw.id, image_id, reference)
        except EngineRejected as error:
            # An engine that keeps its images in containerd does not take one without its layers.
            run.add_message(f"the image of its files keeps the container's variables and command: {error}")
            await self.engine.tag(raw.id, reference)


def needs_flattening(layers: int, base: int) -> bool:
    """Whether an image of so many layers, of which the lowest `base` are the user's, is to be squashed."""
    return layers >= MAX_LAYERS or layers - base > MAX_LAYERS_ABOVE_BASE
