"""The container engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from gpudock_server.model.engine import (
    EngineContainer,
    EngineContainerSpec,
    EngineEvent,
    EngineImage,
    EngineInfo,
    EngineVolume,
    ExecRequest,
    ExecStatus,
    ExecStream,
    RegistryAuth,
    TerminalSize,
)
from gpudock_server.model.spec import RestartPolicy
from gpudock_server.ports.progress import Progress


class ExecSession(Protocol):
    """A process that exec started in a container, with its streams. Raises EngineUnavailable, EngineRejected."""

    def read(self) -> AsyncIterator[tuple[ExecStream, bytes]]:
        """Iterate over the output; ends when the process closes it. The process blocks if the output is not read."""
        ...

    async def write(self, data: bytes) -> None:
        """Write `data` to stdin; returns when the engine has accepted it."""
        ...

    async def close_stdin(self) -> None:
        """Close stdin; the output stays open."""
        ...

    async def resize(self, size: TerminalSize) -> None:
        """Resize the terminal."""
        ...

    async def status(self) -> ExecStatus:
        """Return whether the process runs, its exit code, and its pid on the engine's host."""
        ...

    async def close(self) -> None:
        """Close the connection; the process continues."""
        ...


class Engine(Protocol):
    """The container engine. Raises EngineUnavailable (no answer) and EngineRejected (the engine refused the call).

    "Already done" is success: starting a running container, stopping a stopped one, removing what does not exist, and
    creating what the same operation has created.
    """

    async def info(self) -> EngineInfo:
        """Return the engine's version and id, and the capacity of its host."""
        ...

    async def image(self, reference: str) -> EngineImage | None:
        """Return an image by name or id; None if the engine does not have it."""
        ...

    async def image_names(self) -> tuple[str, ...]:
        """Return the names (`repository:tag`) of all images."""
        ...

    async def image_ids(self) -> tuple[str, ...]:
        """Return the ids of all images, including those without a name."""
        ...

    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        """Pull an image. Raises ImagePullFailed.

        `progress` is called whenever the pull makes progress. A pull that stalls does not end by itself.
        """
        ...

    async def volume_names(self) -> tuple[str, ...]:
        """Return the names of all engine volumes."""
        ...

    async def find_volumes(self, labels: Mapping[str, str]) -> tuple[EngineVolume, ...]:
        """Return the engine volumes that have all these labels."""
        ...

    async def create_volume(
        self, name: str, *, labels: Mapping[str, str], driver_options: Mapping[str, str]
    ) -> EngineVolume:
        """Create a volume of the engine's `local` driver, or return the one with the same name and LABEL_UID.

        Raises VolumeExists if the volume of that name has another LABEL_UID.
        """
        ...

    async def inspect_volume(self, name: str) -> EngineVolume | None:
        """Return a volume; None if the engine does not have it."""
        ...

    async def remove_volume(self, name: str) -> None:
        """Remove an engine volume."""
        ...

    async def mounting(self, volume: str) -> tuple[EngineContainer, ...]:
        """Return all containers, in any state and of any owner, that mount this engine volume."""
        ...

    async def create(self, engine_spec: EngineContainerSpec) -> str:
        """Create a container; returns its engine id."""
        ...

    async def inspect(self, engine_id: str) -> EngineContainer | None:
        """Return a container by id or name; None if the engine does not have it."""
        ...

    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        """Return the containers, in any state, that have all `labels` (an empty value matches any)."""
        ...

    async def start(self, engine_id: str) -> None:
        """Start a container. Raises PortInUse, and StartFailed if its process could not be started."""
        ...

    async def stop(self, engine_id: str, timeout: float) -> None:
        """Stop a container: its stop signal, then SIGKILL after `timeout` seconds; 0: SIGKILL only."""
        ...

    async def pause(self, engine_id: str) -> None:
        """Freeze all processes of a container."""
        ...

    async def unpause(self, engine_id: str) -> None:
        """Thaw all processes of a container."""
        ...

    async def update(
        self,
        engine_id: str,
        *,
        cpus: float,
        memory_bytes: int,
        pids_limit: int = 0,
        restart_policy: RestartPolicy | None = None,
    ) -> None:
        """Change limits in place (0: the default of the node), and the restart policy unless it is None."""
        ...

    async def rename(self, engine_id: str, name: str) -> None:
        """Rename a container. Raises EngineRejected if the name is in use."""
        ...

    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        """Wait for the exit of a container; returns its exit code, or None if it still runs after `seconds`."""
        ...

    async def remove(self, engine_id: str, *, own_volumes: bool = False) -> None:
        """Kill and remove a container; with `own_volumes` also the anonymous volumes that were created with it."""
        ...

    async def commit(
        self,
        engine_id: str,
        reference: str,
        labels: Mapping[str, str],
        *,
        author: str = "",
        comment: str = "",
        changes: Sequence[str] = (),
        config_of: str = "",
    ) -> str:
        """Commit a container to an image named `reference`; returns the id of the image.

        The image has the config of the container, or of the container `config_of`, changed by the Dockerfile lines
        `changes`.
        """
        ...

    async def create_file_holder(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        """Create a container that holds files and never runs; returns its engine id.

        It has the image and the config of container `of` and `labels`, but no GPUs, ports, limits or volumes.
        """
        ...

    async def tag(self, image: str, reference: str) -> None:
        """Tag an image; another image with that name loses it."""
        ...

    async def replace_config(self, image_id: str, other_id: str, reference: str) -> str:
        """Create an image `reference` with the layers of `image_id` and the config of `other_id`; returns its id."""
        ...

    async def strip_identity(self, image_id: str, base_id: str, reference: str) -> str:
        """Create an image `reference` from a committed one, without data that identifies the container; returns its id.

        `base_id` is the image that the container was created from.
        """
        ...

    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        """Create an image `reference` in which the layers above the lowest `base_layers` are merged; returns its id.

        Its config is that of image `config_of`. With `onto` the merged layer is put on the layers of that image
        instead. Raises LayerCarryFailed, DiskFull.
        """
        ...

    async def remove_image(self, reference: str) -> None:
        """Remove an image by name or id. An image in use is kept, which is not an error."""
        ...

    def events(self, since_nanos: int) -> AsyncIterator[EngineEvent]:
        """Iterate over events of gpudock containers since `since_nanos`. Raises EngineUnavailable if it breaks."""
        ...

    async def exec(self, engine_id: str, request: ExecRequest) -> ExecSession:
        """Start a process in a running container.

        Raises nothing if its program cannot be started: the status has the error once the output has ended.
        """
        ...
