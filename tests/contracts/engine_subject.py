"""An implementation of the engine port, as the tests of the port use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpudock_server.model.engine import EngineState
from gpudock_server.ports import Engine

from tests.engine.engine_examples import engine_spec, inspect_container
from tests.unit.model_engine import ModelEngine


@dataclass
class EngineSubject:
    """An implementation, and two images that it has: the second one has a VOLUME line for `volume_target`."""

    engine: Engine
    image: str
    volume_image: str
    volume_target: str
    # Seconds to wait for what a process does; short for fakes, whose processes do nothing.
    patience: float = 0.1

    async def create(self, name: str = "box", **options: object) -> str:
        """Create a container, of the first image unless `image` is given. Returns its id."""
        return await self.engine.create(await engine_spec(self.engine, name, **{"image": self.image, **options}))  # type: ignore[arg-type]  # as engine_spec takes them

    async def running(self, name: str = "box", **options: object) -> str:
        """Create a container as `create` does, and start it. Returns its id."""
        engine_id = await self.create(name, **options)
        await self.engine.start(engine_id)
        return engine_id

    async def running_to_exit(self, code: int) -> str:
        """Start a container whose process exits with this code. Returns its id."""
        if isinstance(self.engine, ModelEngine):
            self.engine.exit_code_at_start = code
        return await self.running(command=("sh", "-c", f"exit {code}"))

    async def write(self, engine_id: str) -> None:
        """Write a file into a container's writable layer, if the implementation has one."""
        if isinstance(self.engine, ModelEngine):
            self.engine.write(engine_id, "written")
        elif upper := (await inspect_container(self.engine, engine_id)).upper_dir:
            Path(upper, "written").touch()  # noqa: ASYNC240 - nothing else waits

    async def state(self, engine_id: str) -> EngineState:
        """Return the state of a container, as the engine shows it."""
        return (await inspect_container(self.engine, engine_id)).state
