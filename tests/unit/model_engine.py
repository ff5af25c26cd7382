"""An engine in memory, with containers, images and volumes that have files.

Unlike FakeEngine of `tests/rpc/fakes.py`, it keeps files, so that a test can compare them after an operation, and it
refuses what the real engine refuses: two containers of one name, a start of a paused container, a copy of files that a
process may write to. Every call can be made to fail, before or after its effect (`Faults`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from gpudock_server.errors import ImageNotFound, ImagePullFailed
from gpudock_server.model.engine import (
    LABEL_OPERATION,
    LABEL_SPEC,
    EngineContainer,
    EngineContainerSpec,
    EngineImage,
    EngineState,
    EngineVolume,
    RegistryAuth,
)
from gpudock_server.model.spec import RestartPolicy
from gpudock_server.ports import Progress
from typing_extensions import override

from tests.rpc.fake_layers import Files
from tests.rpc.fakes import FakeEngine
from tests.unit.faults import Faults

IMAGE, OTHER_IMAGE, REMOTE_IMAGE = "busybox:latest", "debian:12", "registry.example/cuda:12"
_START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Image:
    """An image: its layers, the lowest first, each with the files that it adds; and the owner of its config."""

    id: str
    layers: tuple[tuple[str, Files], ...]
    config: str
    volumes: tuple[str, ...] = ()
    # Whether it has the labels and variables of the container that was committed.
    identity: bool = False
    # Author, comment and Dockerfile instructions of the commit.
    commit_options: tuple[str, ...] = ()

    @property
    def files(self) -> Files:
        """The files of all layers."""
        return frozenset().union(*(files for _, files in self.layers))


class ModelEngine(FakeEngine):
    """The engine. Processes exit at once with `exit_code_at_start`; None: they run."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self.faults = faults
        self.exit_code_at_start: int | None = None
        self.images: dict[str, Image] = {}
        self.tags: dict[str, str] = {}
        # The images that can be pulled.
        self.registry: dict[str, Image] = {}
        # Writable layers by number, and the number of each container.
        self.layers: dict[int, Files] = {}
        self.layer_of: dict[str, int] = {}
        self.created_specs: dict[str, EngineContainerSpec] = {}
        self.stop_timeouts: list[float] = []
        # The durations for which started processes were watched.
        self.start_watch_seconds: list[float] = []
        self._numbers = itertools.count(1)
        for name, volumes in ((IMAGE, ("/cache",)), (OTHER_IMAGE, ())):
            self._add(Image(f"sha256:{name}", ((f"{name}#1", frozenset({name})),), name, volumes), name)
        self.registry[REMOTE_IMAGE] = Image("sha256:remote", (("remote#1", frozenset({"remote"})),), REMOTE_IMAGE)

    def _add(self, image: Image, reference: str) -> str:
        self.images[image.id] = image
        self.tags[reference] = image.id
        return image.id

    def files(self, engine_id: str) -> Files:
        """Return the files that a process of a container sees."""
        return self.images[self.containers[engine_id].image_id].files | self.layers[self.layer_of[engine_id]]

    def write(self, engine_id: str, file: str) -> None:
        """Write a file, as a process of a container does."""
        self.layers[self.layer_of[engine_id]] |= {file}

    # -- images ------------------------------------------------------------------------------------------------------

    def _image(self, reference: str) -> Image | None:
        return self.images.get(self.tags.get(reference, reference))

    @override
    async def image(self, reference: str) -> EngineImage | None:
        async with self.faults.call("image"):
            found = self._image(reference)
            if found is None:
                return None
            layers = tuple(name for name, _ in found.layers)
            return EngineImage(id=found.id, size_bytes=len(found.files), volumes=found.volumes, layers=layers)

    @override
    async def image_ids(self) -> tuple[str, ...]:
        return tuple(self.images)

    @override
    async def image_names(self) -> tuple[str, ...]:
        return tuple(self.tags)

    @override
    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        async with self.faults.call("pull"):
            if reference not in self.registry:
                raise ImagePullFailed(image=reference, detail="the registry has no such image")
            progress(1, 2)
            progress(2, 2)
            self._add(self.registry[reference], reference)

    def _layer(self, files: Files) -> tuple[str, Files]:
        return f"layer {next(self._numbers)}", files

    @override
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
        async with self.faults.call("commit"):
            container = self._require(engine_id, "commit")
            self._require(config_of or engine_id, "commit")
            assert container.state is not EngineState.RUNNING, "its process may write to the files that are committed"
            base, written = self.images[container.image_id], self.layers[self.layer_of[engine_id]]
            image = Image(
                f"sha256:{next(self._numbers)}",
                (*base.layers, *([self._layer(written)] if written else [])),
                f"container {config_of or engine_id}",
                base.volumes,
                identity=True,
                commit_options=(author, comment, *changes),
            )
            return self._add(image, reference)

    @override
    async def tag(self, image: str, reference: str) -> None:
        async with self.faults.call("tag"):
            found = self._image(image)
            if found is None:
                raise self._rejected("tag", f"no such image: {image}", 404)
            self.tags[reference] = found.id

    def _derived(self, image_id: str, reference: str, **changes: object) -> str:
        derived = replace(self.images[image_id], id=f"sha256:{next(self._numbers)}", **changes)  # type: ignore[arg-type]  # fields by name
        return self._add(derived, reference)

    @override
    async def replace_config(self, image_id: str, other_id: str, reference: str) -> str:
        async with self.faults.call("replace_config"):
            other = self.images[other_id]
            return self._derived(image_id, reference, config=other.config, volumes=other.volumes, identity=False)

    @override
    async def strip_identity(self, image_id: str, base_id: str, reference: str) -> str:
        async with self.faults.call("strip_identity"):
            assert base_id in self.images
            return self._derived(image_id, reference, identity=False)

    @override
    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        async with self.faults.call("flatten"):
            image, other = self.images[image_id], self.images[config_of]
            upper = self._layer(frozenset().union(*(files for _, files in image.layers[base_layers:])))
            below = self.images[onto].layers if onto else image.layers[:base_layers]
            return self._derived(
                image_id, reference, layers=(*below, upper), config=other.config, volumes=other.volumes, identity=False
            )

    @override
    async def remove_image(self, reference: str) -> None:
        async with self.faults.call("remove_image"):
            found = self._image(reference)
            if found is None:
                return
            names = [name for name, image_id in self.tags.items() if image_id == found.id]
            used = any(container.image_id == found.id for container in self.containers.values())
            if len(names) > 1 and reference in names:
                del self.tags[reference]
            elif len(names) < 2 and not used:
                self.tags = {name: image_id for name, image_id in self.tags.items() if image_id != found.id}
                del self.images[found.id]

    # -- volumes -----------------------------------------------------------------------------------------------------

    @override
    async def volume_names(self) -> tuple[str, ...]:
        return tuple(self.volumes)

    @override
    async def mounting(self, volume: str) -> tuple[EngineContainer, ...]:
        async with self.faults.call("mounting"):
            return tuple(container for container in self.containers.values() if volume in container.volumes.values())

    @override
    async def create_volume(
        self, name: str, *, labels: Mapping[str, str], driver_options: Mapping[str, str]
    ) -> EngineVolume:
        async with self.faults.call("create_volume"):
            return await super().create_volume(name, labels=labels, driver_options=driver_options)

    @override
    async def find_volumes(self, labels: Mapping[str, str]) -> tuple[EngineVolume, ...]:
        async with self.faults.call("find_volumes"):
            return await super().find_volumes(labels)

    @override
    async def inspect_volume(self, name: str) -> EngineVolume | None:
        async with self.faults.call("inspect_volume"):
            return self.volumes.get(name)

    @override
    async def remove_volume(self, name: str) -> None:
        async with self.faults.call("remove_volume"):
            if any(name in container.volumes.values() for container in self.containers.values()):
                raise self._rejected("remove a volume", f"volume {name} is in use")
            self.volumes.pop(name, None)

    # -- containers --------------------------------------------------------------------------------------------------

    @override
    async def create(self, engine_spec: EngineContainerSpec) -> str:
        async with self.faults.call("create"):
            operation = engine_spec.labels.get(LABEL_OPERATION)
            if found := self._find_by_name(engine_spec.name, operation, "create a container"):
                return found
            image = self.images.get(engine_spec.image_id)
            if image is None:
                raise ImageNotFound(image=engine_spec.spec.image)
            spec = engine_spec.spec
            named = {
                mount.target: engine_spec.mounted.get(mount.volume, mount.volume)
                for mount in spec.mounts
                if mount.volume
            }
            volumes = engine_spec.volumes | named
            number = next(self._numbers)
            for target in image.volumes:
                if target not in volumes:
                    volumes[target] = f"anonymous{number}-{target.strip('/').replace('/', '-')}"
                    self.volumes[volumes[target]] = EngineVolume(name=volumes[target], driver="local", anonymous=True)
            engine_id = f"engine{number}"
            self._add_container(
                engine_id,
                EngineContainer(
                    id=engine_id,
                    name=engine_spec.name,
                    image_id=image.id,
                    state=EngineState.CREATED,
                    pid=0,
                    exit_code=0,
                    oom_killed=False,
                    error="",
                    labels=engine_spec.labels | {LABEL_SPEC: spec.model_dump_json()},
                    gpu_uuids=engine_spec.placement.gpu_uuids,
                    ports=engine_spec.placement.ports,
                    spec=spec,
                    volumes=volumes,
                    binds={
                        mount.target: engine_spec.bound[mount.host_path] for mount in spec.mounts if mount.host_path
                    },
                    cpus=spec.cpus,
                    memory_bytes=spec.memory_bytes,
                    pids_limit=spec.pids_limit,
                    restart_policy=spec.restart_policy,
                    create_time=_START,
                ),
            )
            self.created_specs[engine_id] = engine_spec
            return engine_id

    def _add_container(self, engine_id: str, container: EngineContainer) -> None:
        self.containers[engine_id] = container
        number = next(self._numbers)
        self.layers[number], self.layer_of[engine_id] = frozenset(), number

    @override
    async def create_file_holder(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        async with self.faults.call("create_file_holder"):
            if found := self._find_by_name(name, labels.get(LABEL_OPERATION), "create a container"):
                return found
            source = self._require(of, "create a container")
            engine_id = f"engine{next(self._numbers)}"
            holder = EngineContainer(
                id=engine_id,
                name=name,
                image_id=source.image_id,
                state=EngineState.CREATED,
                pid=0,
                exit_code=0,
                oom_killed=False,
                error="",
                labels=dict(labels),
                gpu_uuids=(),
            )
            self._add_container(engine_id, holder)
            return engine_id

    @override
    async def inspect(self, engine_id: str) -> EngineContainer | None:
        async with self.faults.call("inspect"):
            return await super().inspect(engine_id)

    @override
    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        async with self.faults.call("find"):
            return await super().find(labels)

    @override
    async def start(self, engine_id: str) -> None:
        async with self.faults.call("start"):
            container = self._require(engine_id, "start")
            if container.state is EngineState.PAUSED:
                raise self._rejected("start", "cannot start a paused container, try unpause instead")
            if container.state is EngineState.RUNNING:
                return
            for other in self.containers.values():
                if other.alive:
                    assert not set(other.gpu_uuids) & set(container.gpu_uuids), "two containers run with the same GPU"
                    assert not set(other.ports) & set(container.ports), "two containers publish the same port"
            ended = self.exit_code_at_start is not None
            self.containers[engine_id] = replace(
                container,
                state=EngineState.EXITED if ended else EngineState.RUNNING,
                exit_code=self.exit_code_at_start or 0,
                start_time=_START,
                finish_time=_START if ended else None,
                pid=0 if ended else next(self._numbers),
            )

    @override
    async def stop(self, engine_id: str, timeout: float) -> None:
        async with self.faults.call("stop"):
            container = self.containers.get(engine_id)
            if container is not None and container.alive:
                self.stop_timeouts.append(timeout)
                self.containers[engine_id] = replace(
                    container, state=EngineState.EXITED, exit_code=143, finish_time=_START, pid=0
                )

    @override
    async def pause(self, engine_id: str) -> None:
        async with self.faults.call("pause"):
            await super().pause(engine_id)

    @override
    async def unpause(self, engine_id: str) -> None:
        async with self.faults.call("unpause"):
            await super().unpause(engine_id)

    @override
    async def update(
        self,
        engine_id: str,
        *,
        cpus: float,
        memory_bytes: int,
        pids_limit: int = 0,
        restart_policy: RestartPolicy | None = None,
    ) -> None:
        async with self.faults.call("update"):
            container = self._require(engine_id, "update")
            self.containers[engine_id] = replace(
                container,
                cpus=cpus,
                memory_bytes=memory_bytes,
                pids_limit=pids_limit,
                restart_policy=restart_policy or container.restart_policy,
            )

    @override
    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        async with self.faults.call("exited_within"):
            container = self._require(engine_id, "wait")
            self.start_watch_seconds.append(seconds)
            return None if container.alive else container.exit_code

    @override
    async def remove(self, engine_id: str, *, own_volumes: bool = False) -> None:
        async with self.faults.call("remove"):
            if self.containers.pop(engine_id, None) is not None:
                del self.layers[self.layer_of.pop(engine_id)]
                if own_volumes:
                    prefix = f"anonymous{engine_id.removeprefix('engine')}-"
                    self.volumes = {
                        name: volume for name, volume in self.volumes.items() if not name.startswith(prefix)
                    }
