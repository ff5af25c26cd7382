"""Example specs of engine containers."""

from __future__ import annotations

from typing import Any

from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.engine import EngineContainer, EngineContainerSpec
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.ports import Engine

from tests.calls import IDLE, IMAGE


async def engine_spec(
    engine: Engine,
    name: str = "box",
    *,
    operation: str = "op1",
    gpus: tuple[str, ...] = (),
    ports: tuple[PortBinding, ...] = (),
    volumes: dict[str, str] | None = None,
    bound: dict[str, str] | None = None,
    **spec: Any,
) -> EngineContainerSpec:
    """The spec of an engine container; `spec` are fields of ContainerSpec. The engine must have the image."""
    container_spec = ContainerSpec(**{"image": IMAGE, "command": IDLE, **spec})
    image = await engine.image(container_spec.image)
    assert image is not None
    return EngineContainerSpec(
        name=name,
        image_id=image.id,
        spec=container_spec,
        placement=Placement(gpu_uuids=gpus, ports=ports),
        hostname=name,
        labels={"gpudock.uid": f"uid-{name}", "gpudock.name": name, "gpudock.operation": operation},
        volumes=volumes or {},
        bound=bound or {},
    )


async def start_container(engine: Engine, name: str = "box", **options: Any) -> str:
    """Create a container and start it; returns its engine id."""
    engine_id = await engine.create(await engine_spec(engine, name, **options))
    await engine.start(engine_id)
    return engine_id


async def inspect_container(engine: Engine, engine_id: str) -> EngineContainer:
    """Inspect a container that must exist."""
    container = await engine.inspect(engine_id)
    assert container is not None
    return container
