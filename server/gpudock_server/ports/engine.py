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
)
from gpudock_server.model.spec import RestartPolicy
from gpudock_server.ports.progress import Progress


class ExecSession(Protocol):
    """A process inside a container, with its streams. Raises EngineUnavailable, EngineRejected."""

    def read(self) -> AsyncIterator[tuple[ExecStream, bytes]]:
        """Output as it comes; ends when the process has closed its side. Not reading holds the process back."""
        ...

    async def write(self, data: bytes) -> None:
        """Give `data` to its stdin; returns when the engine has taken it."""
        ...

    async def close_stdin(self) -> None:
        """End its stdin; its output goes on."""
        ...

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal a new size."""
        ...

    async def status(self) -> ExecStatus:
        """Whether it runs, its exit code, its pid on the engine's host."""
        ...

    async def close(self) -> None:
        """Let go of the connection; the process is not touched."""
        ...


class Engine(Protocol):
    """The container engine. Raises EngineUnavailable (no answer) and EngineRejected (an answer that says no).

    "Already done" is success everywhere: starting what runs, stopping what is stopped, removing what is gone, and
    creating what the same operation has created.
    """

    async def info(self) -> EngineInfo:
        """What the engine is and what its host has."""
        ...

    async def image(self, reference: str) -> EngineImage | None:
        """An image that the engine has, by name or id."""
        ...

    async def image_names(self) -> tuple[str, ...]:
        """The names (`repository:tag`) of all images that have one."""
        ...

    async def image_ids(self) -> tuple[str, ...]:
        """The ids of all images, also of those without a name."""
        ...

    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        """Fetch an image. Raises ImagePullFailed.

        `progress` is called at every sign that the pull moves; it may never move again, and then does not end.
        """
        ...

    async def has_volume(self, name: str) -> bool:
        """Whether the engine has a volume of this name."""
        ...

    async def volume_names(self) -> tuple[str, ...]:
        """The names of all engine volumes."""
        ...

    async def find_volumes(self, labels: Mapping[str, str]) -> tuple[EngineVolume, ...]:
        """The engine volumes that have all these labels."""
        ...

    async def create_volume(
        self, name: str, *, labels: Mapping[str, str], driver_options: Mapping[str, str]
    ) -> EngineVolume:
        """Make a volume of the engine's `local` driver, or find the one with the same LABEL_UID.

        Raises VolumeExists where the name is somebody else's.
        """
        ...

    async def inspect_volume(self, name: str) -> EngineVolume | None:
        """One volume; None when the engine says there is none."""
        ...

    async def remove_volume(self, name: str) -> None:
        """Remove an engine volume."""
        ...

    async def mounting(self, volume: str) -> tuple[EngineContainer, ...]:
        """Containers in any state, of whomever, that have this engine volume among their mounts."""
        ...

    async def create(self, engine_spec: EngineContainerSpec) -> str:
        """Create a container and return its engine id."""
        ...

    async def inspect(self, engine_id: str) -> EngineContainer | None:
        """One container, by id or name; None when the engine says there is none."""
        ...

    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        """Containers in any state that carry all of `labels` (an empty value matches any)."""
        ...

    async def start(self, engine_id: str) -> None:
        """Start it. Raises PortInUse where the engine says so, StartFailed where the process could not begin."""
        ...

    async def stop(self, engine_id: str, timeout: float) -> None:
        """Stop it: its stop signal, then after `timeout` seconds SIGKILL; 0 kills at once."""
        ...

    async def pause(self, engine_id: str) -> None:
        """Freeze every process."""
        ...

    async def unpause(self, engine_id: str) -> None:
        """Thaw them."""
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
        """Change its limits in place, 0 is the node's default; and its restart policy, unless it is None."""
        ...

    async def rename(self, engine_id: str, name: str) -> None:
        """Give it another name; EngineRejected where something else has that."""
        ...

    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        """Its exit code if it stops running within `seconds`; None if it still runs then."""
        ...

    async def remove(self, engine_id: str, *, own_volumes: bool = False) -> None:
        """Remove it, killing what runs; with `own_volumes` the anonymous volumes that were made with it, too."""
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
        """Make an image of its files, with the config it had, named `reference`; the id of the image.

        `changes` are Dockerfile lines that change that config, which is that of another container with `config_of`.
        """
        ...

    async def create_file_holder(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        """Create a container with the image and the config of container `of`, which holds files and never runs; its id.

        It has `labels`, and no cards, ports, limits or volumes.
        """
        ...

    async def tag(self, image: str, reference: str) -> None:
        """Name an image; another one that had the name loses it."""
        ...

    async def replace_config(self, image_id: str, other_id: str, reference: str) -> str:
        """Make an image named `reference`, of the layers of one and the config of another; its id."""
        ...

    async def strip_identity(self, image_id: str, base_id: str, reference: str) -> str:
        """Make an image named `reference` out of one that a commit made, less what tells which container that was.

        `base_id` is the image that the container was made from.
        """
        ...

    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        """Make an image named `reference` whose layers above the lowest `base_layers` are one; its id.

        Its config is that of image `config_of`. With `onto` that one layer lies on the layers of another image
        instead. Raises LayerCarryFailed, DiskFull.
        """
        ...

    async def remove_image(self, reference: str) -> None:
        """Remove an image by name or id; one that is still used stays, and that is no error."""
        ...

    def events(self, since_nanos: int) -> AsyncIterator[EngineEvent]:
        """Events of our containers from `since_nanos` on; raises EngineUnavailable when the stream breaks."""
        ...

    async def exec(self, engine_id: str, request: ExecRequest) -> ExecSession:
        """Start a process inside a running container."""
        ...
