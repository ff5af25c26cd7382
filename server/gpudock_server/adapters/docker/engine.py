"""ports.Engine on a Docker Engine."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

from gpudock_server.adapters.docker import translate
from gpudock_server.adapters.docker.address import EngineAddress
from gpudock_server.adapters.docker.connection import Connection, JsonAnswer, path_segment
from gpudock_server.adapters.docker.events import events
from gpudock_server.adapters.docker.exec_session import DockerExecSession
from gpudock_server.adapters.docker.failures import BAD_REQUEST, CONFLICT, NOT_FOUND, engine_errors, start_failure
from gpudock_server.adapters.docker.image_editor import ImageEditor
from gpudock_server.adapters.docker.oom_kills import main_process_oom_killed
from gpudock_server.adapters.docker.pull import pull, split_reference
from gpudock_server.errors import EngineRejected, ImageNotFound, VolumeExists
from gpudock_server.model.engine import (
    LABEL_OPERATION,
    LABEL_UID,
    ContainerDefaults,
    EngineContainer,
    EngineContainerSpec,
    EngineEvent,
    EngineImage,
    EngineInfo,
    EngineState,
    EngineVolume,
    ExecRequest,
    RegistryAuth,
)
from gpudock_server.model.spec import RestartPolicy
from gpudock_server.ports import Progress

# A hundred starts at once take the engine as long as four at a time, but then each of them as long as all together.
_MAX_CONCURRENT_STARTS: Final = 4
_MAX_CONCURRENT_INSPECTS: Final = 8
# What is being created when its caller is cancelled is waited for that long. An engine that takes longer leaves it to
# reconcile.
_CREATE_GRACE_SECONDS: Final = 5.0
# On cgroup v1 runc gives up freezing, and thaws, where processes of a busy host do not come to rest in time (its
# libcontainer/cgroups/fs/freezer.go); a moment later they do. Seconds between the tries.
_FREEZE_FAILED: Final = "unable to freeze"
_FREEZE_RETRY_SECONDS: Final = (0.1, 0.3, 1.0)
# A commit writes the whole layer to the disk and says nothing meanwhile.
_COMMIT_TIMEOUT_FACTOR: Final = 30

# What a reference may consist of. Anything else, and ".." between slashes, could reach another part of the API.
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]*", re.ASCII)


class DockerEngine:
    """Implements ports.Engine. Made by `connect`; may be used by any number of tasks at once.

    Every call ends within the `timeout` it was connected with (a stop, its grace period later; a commit, thirty of
    them, and so does each call that images are edited with), with EngineUnavailable at the latest. A start waits its
    turn before its time begins. One that was cancelled leaves no connection behind, but the engine may go on doing it.
    """

    def __init__(
        self, connection: Connection, scratch_dir: Path | None = None, defaults: ContainerDefaults | None = None
    ) -> None:
        self._connection = connection
        self._defaults = defaults or ContainerDefaults()
        self._images = ImageEditor(connection, scratch_dir)
        self._starts = asyncio.Semaphore(_MAX_CONCURRENT_STARTS)
        self._inspects = asyncio.Semaphore(_MAX_CONCURRENT_INSPECTS)

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        tls: Path | None = None,
        timeout: float = 60.0,
        scratch_dir: Path | None = None,
        defaults: ContainerDefaults | None = None,
    ) -> Self:
        """Connect to `unix:///PATH` or `tcp://HOST:PORT` and agree on an API version.

        `tls` is a folder with ca.pem, cert.pem and key.pem; `timeout` is in seconds; `scratch_dir` is a folder with
        room for image layers that are worked on (None: the system's); `defaults` is what containers are created with.
        Raises ValueError for an address or a certificate that cannot be used, EngineUnavailable, and EngineRejected
        where no API version fits.
        """
        connection = Connection(EngineAddress.parse(url, tls), timeout)
        try:
            await connection.negotiate()
        except BaseException:
            await connection.close()
            raise
        return cls(connection, scratch_dir, defaults)

    async def close(self) -> None:
        """Close all connections; exec sessions keep theirs. May be called again."""
        await self._connection.close()

    async def info(self) -> EngineInfo:
        """What the engine is and what its host has. Negotiates the API version: the engine may have been replaced."""
        await self._connection.negotiate()
        answer: JsonAnswer = await self._connection.call("describe itself", "GET", "info")
        major, minor = self._connection.version
        return translate.info(answer, f"{major}.{minor}")

    async def image(self, reference: str) -> EngineImage | None:
        """An image by name or id; None also where `reference` cannot name one."""
        if not _is_reference(reference):
            return None
        call = "show an image"
        try:
            answer: JsonAnswer = await self._connection.call(call, "GET", f"images/{reference}/json")
        except EngineRejected as rejection:
            if rejection.status in (NOT_FOUND, BAD_REQUEST):
                return None
            raise
        with engine_errors(call):
            return translate.image(answer)

    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        """Fetch an image. Raises ImagePullFailed. Cancelling it cancels the engine's pull."""
        await pull(self._connection, reference, auth, progress)

    async def has_volume(self, name: str) -> bool:
        """Whether the engine has a volume of this name."""
        return await self.inspect_volume(name) is not None

    async def volume_names(self) -> tuple[str, ...]:
        """The names of all volumes."""
        call = "list volumes"
        answer: JsonAnswer = await self._connection.call(call, "GET", "volumes")
        with engine_errors(call):
            return tuple(str(volume["Name"]) for volume in answer["Volumes"] or ())

    async def find_volumes(self, labels: Mapping[str, str]) -> tuple[EngineVolume, ...]:
        """The volumes that have all these labels."""
        call = "list volumes"
        wanted = {"label": [f"{key}={value}" for key, value in labels.items()]}
        params = {"filters": json.dumps(wanted)}
        answer: JsonAnswer = await self._connection.call(call, "GET", "volumes", params=params)
        with engine_errors(call):
            return tuple(translate.volume(volume) for volume in answer["Volumes"] or ())

    async def image_names(self) -> tuple[str, ...]:
        """The names (`repository:tag`) of all images that have one."""
        call = "list images"
        images: list[JsonAnswer] = await self._connection.call(call, "GET", "images/json")
        with engine_errors(call):
            return tuple(str(tag) for image in images for tag in image["RepoTags"] or () if tag != "<none>:<none>")

    async def image_ids(self) -> tuple[str, ...]:
        """The ids of all images, also of those without a name."""
        call = "list images"
        images: list[JsonAnswer] = await self._connection.call(call, "GET", "images/json", params={"all": "1"})
        with engine_errors(call):
            return tuple(str(image["Id"]) for image in images)

    async def create_volume(
        self, name: str, *, labels: Mapping[str, str], driver_options: Mapping[str, str]
    ) -> EngineVolume:
        """Make a volume of the `local` driver, or find the one that carries the same LABEL_UID.

        Raises VolumeExists where the name is somebody else's: an engine asked to make what it has gives that back,
        whatever its options and labels are.
        """
        call = "create a volume"
        body = {"Name": name, "Driver": "local", "DriverOpts": dict(driver_options), "Labels": dict(labels)}
        try:
            answer: JsonAnswer = await self._connection.call(call, "POST", "volumes/create", body=body)
        except EngineRejected as rejection:
            # A volume of that name that another driver keeps.
            if rejection.status == CONFLICT or "already exists" in rejection.detail:
                raise VolumeExists(volume=name) from rejection
            raise
        with engine_errors(call):
            made = translate.volume(answer)
        if made.labels.get(LABEL_UID, "") != labels[LABEL_UID] or made.options != dict(driver_options):
            raise VolumeExists(volume=name)
        return made

    async def inspect_volume(self, name: str) -> EngineVolume | None:
        """One volume; None when the engine says that there is none."""
        call = "show a volume"
        try:
            answer: JsonAnswer = await self._connection.call(call, "GET", f"volumes/{path_segment(name)}")
        except EngineRejected as rejection:
            if rejection.status == NOT_FOUND:
                return None
            raise
        with engine_errors(call):
            return translate.volume(answer)

    async def remove_volume(self, name: str) -> None:
        """Remove a volume; one that is gone is no error, one in use is EngineRejected."""
        await self._call_idempotent(
            "remove a volume", "DELETE", f"volumes/{path_segment(name)}", done_statuses=(NOT_FOUND,)
        )

    async def create(self, engine_spec: EngineContainerSpec) -> str:
        """Create a container, or find the one that the same operation has created; its id.

        A caller that is cancelled waits for it for a while (see `_finish_creation`). Raises ImageNotFound too: the
        image may have been removed since it was looked up.
        """
        return await _finish_creation(self._create(engine_spec))

    async def _create(self, engine_spec: EngineContainerSpec) -> str:
        call = "create a container"
        request = translate.create_request(engine_spec, self._defaults)
        params = {"name": path_segment(engine_spec.name)}
        try:
            answer: JsonAnswer = await self._connection.call(
                call, "POST", "containers/create", params=params, body=request
            )
        except EngineRejected as rejection:
            if rejection.status == NOT_FOUND:
                raise ImageNotFound(image=engine_spec.spec.image) from rejection
            if rejection.status == CONFLICT and (found := await self._created_by_same_operation(engine_spec)):
                return found
            raise
        with engine_errors(call):
            return str(answer["Id"])

    async def _created_by_same_operation(self, engine_spec: EngineContainerSpec) -> str | None:
        """The id of the container that `engine_spec` names, if the same operation made it."""
        found = await self.inspect(engine_spec.name)
        operation = engine_spec.labels.get(LABEL_OPERATION)
        return found.id if found and operation and found.labels.get(LABEL_OPERATION) == operation else None

    async def inspect(self, engine_id: str) -> EngineContainer | None:
        """One container by id or name; None when the engine says that there is none."""
        answer = await self._inspect(engine_id)
        if answer is None:
            return None
        with engine_errors("show a container"):
            shown = translate.container(answer)
        if not shown.oom_killed:
            return shown
        return replace(shown, oom_killed=await main_process_oom_killed(self._connection, shown))

    async def _inspect(self, engine_id: str) -> JsonAnswer | None:
        try:
            answer: JsonAnswer = await self._connection.call(
                "show a container", "GET", f"containers/{path_segment(engine_id)}/json"
            )
        except EngineRejected as rejection:
            if rejection.status == NOT_FOUND:
                return None
            raise
        return answer

    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        """Containers in any state that carry all of `labels`; an empty value matches any.

        A container also carries the labels of its image: one that somebody made from an image that came of a commit
        looks like the container that was committed, but for its id.
        """
        call = "list containers"
        wanted = [f"{name}={value}" if value else name for name, value in labels.items()]
        params = {"all": "1", "filters": json.dumps({"label": wanted})}
        answer: list[JsonAnswer] = await self._connection.call(call, "GET", "containers/json", params=params)
        with engine_errors(call):
            ids = [str(item["Id"]) for item in answer]
        found = await asyncio.gather(*(self._inspect_bounded(engine_id) for engine_id in ids))
        return tuple(one for one in found if one is not None)

    async def mounting(self, volume: str) -> tuple[EngineContainer, ...]:
        """Containers in any state that have this volume among their mounts."""
        call = "list containers"
        params = {"all": "1", "filters": json.dumps({"volume": [volume]})}
        answer: list[JsonAnswer] = await self._connection.call(call, "GET", "containers/json", params=params)
        with engine_errors(call):
            ids = [str(item["Id"]) for item in answer]
        found = await asyncio.gather(*(self._inspect_bounded(engine_id) for engine_id in ids))
        # The engine's filter also takes a target for a name.
        return tuple(one for one in found if one is not None and volume in one.volumes.values())

    async def _inspect_bounded(self, engine_id: str) -> EngineContainer | None:
        async with self._inspects:
            return await self.inspect(engine_id)

    async def start(self, engine_id: str) -> None:
        """Start it; one that runs is no error. Raises PortInUse, StartFailed.

        After a failure the container is still there, in state CREATED or EXITED, and may be started again.
        """
        async with self._starts:
            try:
                # 304, "already started", is no error status and comes back like success.
                await self._connection.call("start a container", "POST", f"containers/{path_segment(engine_id)}/start")
            except EngineRejected as rejection:
                # Gone, paused, or being removed: a state that forbids it, and no failed start.
                if rejection.status == CONFLICT or (container := await self._inspect(engine_id)) is None:
                    raise
                raise start_failure(rejection, container) from rejection

    async def stop(self, engine_id: str, timeout: float) -> None:
        """Stop it: its stop signal, then after `timeout` seconds (whole ones, rounded up) SIGKILL; 0 kills at once.

        One that does not run, or is gone, is no error.
        """
        grace = translate.whole_seconds(timeout)
        # The engine's `stop` sends the stop signal first, also where it leaves the process no time for it.
        call, params = ("stop", {"t": str(grace)}) if grace else ("kill", {"signal": "SIGKILL"})
        await self._call_idempotent(
            f"{call} a container",
            "POST",
            f"containers/{path_segment(engine_id)}/{call}",
            params=params,
            timeout=self._connection.timeout + grace,
            # One that does not run: of `stop` that is a success, of `kill` a conflict.
            done_statuses=(NOT_FOUND,) if grace else (NOT_FOUND, CONFLICT),
        )

    async def pause(self, engine_id: str) -> None:
        """Freeze every process; one that is frozen is no error."""
        await self._retry_until_state("pause", engine_id, EngineState.PAUSED)

    async def unpause(self, engine_id: str) -> None:
        """Thaw every process; one that runs is no error."""
        await self._retry_until_state("unpause", engine_id, EngineState.RUNNING)

    async def _retry_until_state(self, verb: str, engine_id: str, wanted: EngineState) -> None:
        call, path = f"{verb} a container", f"containers/{path_segment(engine_id)}/{verb}"
        for later in (*_FREEZE_RETRY_SECONDS, None):
            try:
                await self._connection.call(call, "POST", path)
            except EngineRejected as rejection:
                # "Already done" has another status and another message in every version; the state has not.
                found = await self.inspect(engine_id)
                if found is not None and found.state is wanted:
                    return
                if later is None or _FREEZE_FAILED not in rejection.detail:
                    raise
                await asyncio.sleep(later)
            else:
                return

    async def update(
        self,
        engine_id: str,
        *,
        cpus: float,
        memory_bytes: int,
        pids_limit: int = 0,
        restart_policy: RestartPolicy | None = None,
    ) -> None:
        """Change its limits and restart policy (None: leave it).

        A limit of 0 is the node's default; where there is none, the engine shows all of its host for CPUs and memory.
        The kernel refuses a limit below the memory in use (EngineRejected), and then nothing has changed.
        """
        call = "update a container"
        container = await self._inspect(engine_id)
        if container is None:
            raise EngineRejected(call=call, status=NOT_FOUND, detail=f"there is no container {engine_id}")
        changes = translate.limit_changes(
            container["HostConfig"],
            cpus=cpus,
            memory_bytes=memory_bytes,
            pids_limit=pids_limit,
            host=await self.info(),
            limits=self._defaults.limits,
        )
        if restart_policy is not None:
            changes |= translate.policy_changes(container["HostConfig"], restart_policy)
        if changes:
            await self._connection.call(call, "POST", f"containers/{path_segment(engine_id)}/update", body=changes)

    async def rename(self, engine_id: str, name: str) -> None:
        """Give it another name; one that has it already is no error, and one that another has is EngineRejected."""
        path = f"containers/{path_segment(engine_id)}/rename"
        try:
            await self._connection.call("rename a container", "POST", path, params={"name": path_segment(name)})
        except EngineRejected:
            found = await self.inspect(engine_id)
            if found is None or found.name != name:
                raise

    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        """Its exit code if it stops running within `seconds`; None if it still runs then.

        One that was never started has the exit code 0; one with a restart policy counts as stopped at every exit.
        """
        call = "wait for a container"
        path = f"containers/{path_segment(engine_id)}/wait"
        async with self._connection.stream(call, "POST", path, params={"condition": "not-running"}) as response:
            with engine_errors(call):
                timeout = asyncio.timeout(max(seconds, 0.0))
                try:
                    async with timeout:
                        payload = await response.read()
                except TimeoutError:
                    if timeout.expired():
                        return None
                    raise
                # An engine that shuts down ends the answer without a word.
                return int(json.loads(payload)["StatusCode"])

    async def remove(self, engine_id: str, *, own_volumes: bool = False) -> None:
        """Remove it, killing what runs. Returns when it is gone; one that is gone is no error.

        `own_volumes`: the engine removes the anonymous volumes that it made with it; those that it was given by their
        names stay, also if they were made with another container.
        """
        path, call = f"containers/{path_segment(engine_id)}", "remove a container"
        try:
            params = {"force": "1", "v": "1" if own_volumes else "0"}
            await self._call_idempotent(call, "DELETE", path, params=params, done_statuses=(NOT_FOUND,))
        except EngineRejected as rejection:
            # Somebody else is removing it. Wait for that; if it failed, the refusal stands.
            if rejection.status != CONFLICT or not await self._removed(path):
                raise

    async def _removed(self, path: str) -> bool:
        """Whether the engine, asked to tell when a container is removed, says so within the timeout."""
        call = "remove a container"
        try:
            await self._connection.call(call, "POST", f"{path}/wait", params={"condition": "removed"})
        except EngineRejected as rejection:
            return rejection.status == NOT_FOUND
        return await self._inspect(path.rpartition("/")[2]) is None

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
        """Make an image of its files, with the config it had and `labels` on top, named `reference`; its id.

        The container is not paused: the caller sees to it that nothing writes, or takes what there is. The image names
        no cards, whatever the container had. `changes` are Dockerfile lines that the config is then changed by; one
        that the engine does not understand is EngineRejected.
        """
        call = "commit a container"
        name, tag = split_reference(reference)
        params = {"container": path_segment(engine_id), "repo": name, "tag": tag, "pause": "0"}
        # Empty changes are a file without instructions, which is refused.
        said = {"author": author, "comment": comment, "changes": "\n".join(changes)}
        params |= {key: value for key, value in said.items() if value}
        shown = await self._inspect(config_of or engine_id)
        if shown is None:
            detail = f"there is no container {config_of or engine_id}"
            raise EngineRejected(call=call, status=NOT_FOUND, detail=detail)
        answer: JsonAnswer = await self._connection.call(
            call,
            "POST",
            "commit",
            params=params,
            body=translate.commit_request(shown.get("Config") or {}, labels),
            timeout=self._connection.timeout * _COMMIT_TIMEOUT_FACTOR,
        )
        with engine_errors(call):
            return str(answer["Id"])

    async def create_file_holder(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        """Create a container like `of` that holds files and never runs, or find the one that was made; its id.

        A caller that is cancelled waits for it for a while (see `_finish_creation`).
        """
        return await _finish_creation(self._create_shadow(of, name, labels))

    async def _create_shadow(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        call = "create a container"
        shown = await self._inspect(of)
        if shown is None:
            raise EngineRejected(call=call, status=NOT_FOUND, detail=f"there is no container {of}")
        try:
            answer: JsonAnswer = await self._connection.call(
                call,
                "POST",
                "containers/create",
                params={"name": path_segment(name)},
                body=translate.shadow_request(shown, labels),
            )
        except EngineRejected as rejection:
            found = await self.inspect(name) if rejection.status == CONFLICT else None
            if found is None or found.labels.get(LABEL_OPERATION) != labels[LABEL_OPERATION]:
                raise
            return found.id
        with engine_errors(call):
            return str(answer["Id"])

    async def tag(self, image: str, reference: str) -> None:
        """Name an image; another one that had the name loses it."""
        name, tag = split_reference(reference)
        if not _is_reference(image) or not _is_reference(reference):
            raise EngineRejected(call="tag an image", status=BAD_REQUEST, detail=f"{reference!r} cannot name an image")
        await self._connection.call("tag an image", "POST", f"images/{image}/tag", params={"repo": name, "tag": tag})

    async def replace_config(self, image_id: str, other_id: str, reference: str) -> str:
        """Make an image named `reference`, of the layers of one and the config of another; its id."""
        return await self._images.replace_config(image_id, other_id, reference)

    async def strip_identity(self, image_id: str, base_id: str, reference: str) -> str:
        """Make an image named `reference` out of one that a commit made, less what tells which container that was.

        `base_id` is the image that the container was made from. What is left out: our labels, what we said of cards,
        host name and streams.
        """
        return await self._images.strip_identity(image_id, base_id, reference)

    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        """Make an image named `reference` whose layers above the lowest `base_layers` are one; its id.

        Its config is that of image `config_of`. With `onto` that one layer lies on the layers of another image
        instead. Raises LayerCarryFailed where the layers make no sense, DiskFull.
        """
        return await self._images.flatten(image_id, base_layers, reference, config_of=config_of, onto=onto)

    async def remove_image(self, reference: str) -> None:
        """Remove an image by name or id; one that is still used stays, and that is no error.

        Its parents stay as well: an untagged one may be what a user's containers are made from.
        """
        if not _is_reference(reference):
            return
        path = f"images/{reference}"
        await self._call_idempotent(
            "remove an image", "DELETE", path, params={"noprune": "1"}, done_statuses=(NOT_FOUND, CONFLICT)
        )

    def events(self, since_nanos: int) -> AsyncIterator[EngineEvent]:
        """Events of our containers, those at `since_nanos` included (0: from now on); ends by EngineUnavailable."""
        return events(self._connection, since_nanos)

    async def exec(self, engine_id: str, request: ExecRequest) -> DockerExecSession:
        """Start a process inside a running container.

        A command that cannot be started is no error here: the engine says why on its standard output, and its exit
        code is 126 or 127.
        """
        return await DockerExecSession.start(self._connection, path_segment(engine_id), request)

    async def _call_idempotent(
        self,
        call: str,
        method: str,
        path: str,
        *,
        done_statuses: tuple[int, ...],
        params: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        """A call for which the statuses in `done_statuses` mean that there is nothing left to do."""
        try:
            await self._connection.call(call, method, path, params=params, timeout=timeout)
        except EngineRejected as rejection:
            if rejection.status not in done_statuses:
                raise


def _is_reference(text: str) -> bool:
    return _REFERENCE.fullmatch(text) is not None and not any(part in ("", ".", "..") for part in text.split("/"))


async def _finish_creation(work: Coroutine[Any, Any, str]) -> str:
    """The id of a container that is being created.

    The engine goes on with it when the caller is gone. So a caller that is cancelled waits for the end for a while, and
    the undo that follows finds the container.
    """
    creating = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(creating)
    except asyncio.CancelledError:
        await asyncio.wait((creating,), timeout=_CREATE_GRACE_SECONDS)
        creating.cancel()
        # Whatever came of it, nobody asks for it any more.
        await asyncio.gather(creating, return_exceptions=True)
        raise
    finally:
        creating.cancel()
