"""Two stopped containers of one image with files in their writable layers, on disk and in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

from gpudock_server.model.container import Placement
from gpudock_server.model.engine import LABEL_OPERATION, EngineContainer, EngineContainerSpec, EngineState
from gpudock_server.model.spec import ContainerSpec

from tests.engine.sample_trees import create_layer_folders
from tests.unit.faults import Faults
from tests.unit.model_engine import IMAGE, ModelEngine


class TwoContainers(Protocol):
    """Two containers. `target` has never run."""

    source: EngineContainer
    target: EngineContainer

    @property
    def running(self) -> EngineContainer:
        """The source, running."""
        return dataclasses.replace(self.source, state=EngineState.RUNNING)

    def write(self, name: str) -> None:
        """Write a file in the source."""

    def files(self, container: EngineContainer) -> frozenset[str]:
        """Return the files in the layer of a container."""


class OverlayContainers(TwoContainers):
    """Layers in a folder with the layout of overlay2, without an engine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source, self.target = (_container(str(number), upper) for number, upper in _layers(root))

    def write(self, name: str) -> None:
        """Write a file in the source."""
        Path(self.source.upper_dir, name).write_text(name)

    def files(self, container: EngineContainer) -> frozenset[str]:
        """Return the files in the layer of a container."""
        return frozenset(path.name for path in Path(container.upper_dir).iterdir())


def _layers(root: Path) -> list[tuple[int, Path]]:
    return list(enumerate(create_layer_folders(root, 1, 2)))


class FakeContainers(TwoContainers):
    """Layers without files."""

    def __init__(self) -> None:
        self.source, self.target = (_container(name) for name in ("source", "target"))

    def write(self, name: str) -> None:
        """Write nothing."""

    def files(self, container: EngineContainer) -> frozenset[str]:
        """Return no files."""
        assert container in (self.source, self.target)
        return frozenset()


class ModelContainers(TwoContainers):
    """Layers of an engine in memory."""

    def __init__(self, engine: ModelEngine, source: EngineContainer, target: EngineContainer) -> None:
        self.engine, self.source, self.target = engine, source, target

    def write(self, name: str) -> None:
        """Write a file in the source."""
        self.engine.write(self.source.id, name)

    def files(self, container: EngineContainer) -> frozenset[str]:
        """Return the files in the layer of a container."""
        return self.engine.layers[self.engine.layer_of[container.id]]


async def model_containers() -> ModelContainers:
    """Return containers of a new engine."""
    engine = ModelEngine(Faults())
    source, target = [await _created(engine, name) for name in ("source", "target")]
    return ModelContainers(engine, source, target)


async def _created(engine: ModelEngine, name: str) -> EngineContainer:
    image = await engine.image(IMAGE)
    assert image is not None
    spec = EngineContainerSpec(
        name=name,
        image_id=image.id,
        spec=ContainerSpec(image=IMAGE),
        placement=Placement(),
        hostname=name,
        labels={LABEL_OPERATION: name},
    )
    return engine.containers[await engine.create(spec)]


def _container(name: str, upper: Path | None = None) -> EngineContainer:
    return EngineContainer(
        id=upper.parent.name if upper else name,
        name=name,
        image_id=f"sha256:{1:064x}",
        state=EngineState.EXITED,
        pid=0,
        exit_code=0,
        oom_killed=False,
        error="",
        labels={},
        gpu_uuids=(),
        upper_dir=str(upper) if upper else "",
        storage_driver="overlay2",
    )
