"""Calls about containers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import stamina

from gpudock_server.adapters.docker import translate
from gpudock_server.adapters.docker.connection import Connection, path_segment
from gpudock_server.adapters.docker.failures import (
    CONFLICT,
    NOT_FOUND,
    engine_errors,
    is_freeze_timeout,
    start_failure,
)
from gpudock_server.adapters.docker.oom_kills import main_process_oom_killed
from gpudock_server.adapters.docker.translate import Json
from gpudock_server.errors import EngineRejected, ImageNotFound
from gpudock_server.model.engine import (
    LABEL_OPERATION,
    ContainerDefaults,
    EngineContainer,
    EngineContainerSpec,
    EngineInfo,
    EngineState,
)
from gpudock_server.model.image_reference import split_reference
from gpudock_server.model.spec import RestartPolicy

# An engine needs as long for a hundred concurrent starts as for starts four at a time, but then each start takes as
# long as all together.
_MAX_CONCURRENT_STARTS: Final = 4
_MAX_CONCURRENT_INSPECTS: Final = 8
# How long a cancelled caller waits for the creation that it has requested. Reconcile finds what is created later.
_CREATE_GRACE_SECONDS: Final = 5.0
# Waits of 0.1, 0.3 and 0.9 s between tries to freeze: see failures.is_freeze_timeout.
_FREEZE_ATTEMPTS: Final = 4
_FREEZE_BACKOFF_SECONDS: Final = 0.1
_FREEZE_BACKOFF_FACTOR: Final = 3
# The engine answers a commit only after it has written the whole layer to disk.
_COMMIT_TIMEOUT_FACTOR: Final = 30


class ContainerCalls:
    """The part of DockerEngine that is about containers; `defaults` apply to every container created."""

    def __init__(self, connection: Connection, defaults: ContainerDefaults) -> None:
        self._connection = connection
        self._defaults = defaults
        self._starts = asyncio.Semaphore(_MAX_CONCURRENT_STARTS)
        self._inspects = asyncio.Semaphore(_MAX_CONCURRENT_INSPECTS)

    async def info(self) -> EngineInfo:
        """Version, storage and host of the engine. Negotiates the API version again: the engine may be a new one."""
        await self._connection.negotiate()
        answer: Json = await self._connection.call("report its info", "GET", "info")
        major, minor = self._connection.version
        return translate.info(answer, f"{major}.{minor}")

    async def create(self, engine_spec: EngineContainerSpec) -> str:
        """Create a container, or find the one that the same operation has created; returns its id.

        A cancelled caller waits for the creation for a while: see `_finish_creation`. Raises ImageNotFound: the image
        may have been removed since it was looked up.
        """
        return await _finish_creation(self._create(engine_spec))

    async def _create(self, engine_spec: EngineContainerSpec) -> str:
        call = "create a container"
        request = translate.create_request(engine_spec, self._defaults)
        params = {"name": path_segment(engine_spec.name)}
        try:
            answer: Json = await self._connection.call(call, "POST", "containers/create", params=params, body=request)
        except EngineRejected as rejection:
            if rejection.status == NOT_FOUND:
                raise ImageNotFound(image=engine_spec.spec.image) from rejection
            if rejection.status == CONFLICT and (existing := await self._created_by_same_operation(engine_spec)):
                return existing
            raise
        with engine_errors(call):
            return str(answer["Id"])

    async def _created_by_same_operation(self, engine_spec: EngineContainerSpec) -> str | None:
        """The id of the container named in `engine_spec`, if the same operation created it."""
        existing = await self.inspect(engine_spec.name)
        operation = engine_spec.labels.get(LABEL_OPERATION)
        return existing.id if existing and operation and existing.labels.get(LABEL_OPERATION) == operation else None

    async def inspect(self, engine_id: str) -> EngineContainer | None:
        """One container by id or name; None if the engine has no such container."""
        answer = await self._inspect(engine_id)
        if answer is None:
            return None
        with engine_errors("inspect a container"):
            container = translate.container(answer)
        if not container.oom_killed:
            return container
        return replace(container, oom_killed=await main_process_oom_killed(self._connection, container))

    async def _inspect(self, engine_id: str) -> Json | None:
        try:
            answer: Json = await self._connection.call(
                "inspect a container", "GET", f"containers/{path_segment(engine_id)}/json"
            )
        except EngineRejected as rejection:
            if rejection.status == NOT_FOUND:
                return None
            raise
        return answer

    async def _inspect_existing(self, engine_id: str, call: str) -> Json:
        """The inspect JSON. Raises EngineRejected for `call` if there is no such container."""
        answer = await self._inspect(engine_id)
        if answer is None:
            raise EngineRejected(call=call, status=NOT_FOUND, detail=f"container {engine_id} does not exist")
        return answer

    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        """Containers in any state that have all of `labels`; an empty value matches any.

        A container has the labels of its image as well. One that another user created from a committed
        image therefore has the labels of the committed container, and differs from it only in its id.
        """
        return await self._find({"label": [f"{name}={value}" if value else name for name, value in labels.items()]})

    async def mounting(self, volume: str) -> tuple[EngineContainer, ...]:
        """Containers in any state that mount the engine volume `volume`."""
        # The engine's filter matches a mount's target as well as its name.
        found = await self._find({"volume": [volume]})
        return tuple(container for container in found if volume in container.volumes.values())

    async def _find(self, filters: Mapping[str, Sequence[str]]) -> tuple[EngineContainer, ...]:
        call = "list containers"
        params = {"all": "1", "filters": json.dumps(filters)}
        answer: list[Json] = await self._connection.call(call, "GET", "containers/json", params=params)
        with engine_errors(call):
            ids = [str(item["Id"]) for item in answer]
        found = await asyncio.gather(*(self._inspect_bounded(engine_id) for engine_id in ids))
        return tuple(container for container in found if container is not None)

    async def _inspect_bounded(self, engine_id: str) -> EngineContainer | None:
        async with self._inspects:
            return await self.inspect(engine_id)

    async def start(self, engine_id: str) -> None:
        """Start a container; a running one is no error. Raises PortInUse, StartFailed.

        After a failure the container still exists, in state CREATED or EXITED, and may be started again.
        """
        async with self._starts:
            try:
                # Status 304 ("already started") counts as success.
                await self._connection.call("start a container", "POST", f"containers/{path_segment(engine_id)}/start")
            except EngineRejected as rejection:
                # Missing, paused or being removed: the state forbids a start, and no start was tried.
                if rejection.status == CONFLICT or (container := await self._inspect(engine_id)) is None:
                    raise
                raise start_failure(rejection, container) from rejection

    async def stop(self, engine_id: str, timeout: float) -> None:
        """Send the stop signal, and SIGKILL after `timeout` seconds (rounded up to whole ones); 0 kills at once.

        A stopped or missing container is no error.
        """
        grace = translate.whole_seconds(timeout)
        # The engine's `stop` sends the stop signal first, even with a grace period of 0.
        call, params = ("stop", {"t": str(grace)}) if grace else ("kill", {"signal": "SIGKILL"})
        await self._connection.call_idempotent(
            f"{call} a container",
            "POST",
            f"containers/{path_segment(engine_id)}/{call}",
            params=params,
            timeout=self._connection.timeout + grace,
            # For a stopped container, `stop` succeeds and `kill` is a conflict.
            done_statuses=(NOT_FOUND,) if grace else (NOT_FOUND, CONFLICT),
        )

    async def pause(self, engine_id: str) -> None:
        """Freeze every process; a paused container is no error."""
        await self._retry_until_state("pause", engine_id, EngineState.PAUSED)

    async def unpause(self, engine_id: str) -> None:
        """Thaw every process; a running container is no error."""
        await self._retry_until_state("unpause", engine_id, EngineState.RUNNING)

    async def _retry_until_state(self, verb: str, engine_id: str, target: EngineState) -> None:
        call, path = f"{verb} a container", f"containers/{path_segment(engine_id)}/{verb}"
        async for attempt in stamina.retry_context(
            on=is_freeze_timeout,
            attempts=_FREEZE_ATTEMPTS,
            timeout=None,
            wait_initial=_FREEZE_BACKOFF_SECONDS,
            wait_exp_base=_FREEZE_BACKOFF_FACTOR,
            wait_jitter=0,
        ):
            with attempt:
                try:
                    await self._connection.call(call, "POST", path)
                except EngineRejected:
                    # The status and message for "already in this state" differ between engine versions; the state does
                    # not.
                    container = await self.inspect(engine_id)
                    if container is None or container.state is not target:
                        raise

    async def update(
        self,
        engine_id: str,
        *,
        cpus: float,
        memory_bytes: int,
        pids_limit: int = 0,
        restart_policy: RestartPolicy | None = None,
    ) -> None:
        """Change the limits and restart policy of a container (None: keep the policy).

        A limit of 0 means the node's default; if the node has none, the CPUs and memory of the engine's host. A memory
        limit below the memory in use raises EngineRejected, and nothing changes.
        """
        call = "update a container"
        container = await self._inspect_existing(engine_id, call)
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
        """Rename a container. Having the name already is no error; a name in use raises EngineRejected."""
        path = f"containers/{path_segment(engine_id)}/rename"
        try:
            await self._connection.call("rename a container", "POST", path, params={"name": path_segment(name)})
        except EngineRejected:
            container = await self.inspect(engine_id)
            if container is None or container.name != name:
                raise

    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        """The exit code of a container that stops running within `seconds`; None if it still runs then.

        A container that was never started has exit code 0; one with a restart policy counts as stopped at every exit.
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
                # An engine that shuts down sends an empty body, which is no JSON.
                return int(json.loads(payload)["StatusCode"])

    async def remove(self, engine_id: str, *, own_volumes: bool = False) -> None:
        """Kill and remove a container. Returns when it no longer exists; a missing one is no error.

        `own_volumes`: also remove the anonymous volumes that the engine created with this container. Volumes that it
        was given by name stay, even if they were created with another container.
        """
        path, call = f"containers/{path_segment(engine_id)}", "remove a container"
        try:
            params = {"force": "1", "v": "1" if own_volumes else "0"}
            await self._connection.call_idempotent(call, "DELETE", path, params=params, done_statuses=(NOT_FOUND,))
        except EngineRejected as rejection:
            # Another caller is removing it: wait for that removal. If it fails, the rejection stands.
            if rejection.status != CONFLICT or not await self._removed(path):
                raise

    async def _removed(self, path: str) -> bool:
        """Wait until the container at `path` is removed; False if it still exists."""
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
        """Create an image named `reference` from a container's files and config, with `labels` added; returns its id.

        `config_of` names another container to take the config from. The container is not paused: the caller makes sure
        that nothing writes, or accepts what is there. The image's config names no GPUs. `changes` are Dockerfile lines
        that change the config; one that the engine does not accept raises EngineRejected.
        """
        call = "commit a container"
        name, tag = split_reference(reference)
        params = {"container": path_segment(engine_id), "repo": name, "tag": tag, "pause": "0"}
        # Only what is given: the engine rejects empty `changes` as a Dockerfile without instructions.
        optional = {"author": author, "comment": comment, "changes": "\n".join(changes)}
        params |= {key: value for key, value in optional.items() if value}
        container = await self._inspect_existing(config_of or engine_id, call)
        answer: Json = await self._connection.call(
            call,
            "POST",
            "commit",
            params=params,
            body=translate.commit_request(container.get("Config") or {}, labels),
            timeout=self._connection.timeout * _COMMIT_TIMEOUT_FACTOR,
        )
        with engine_errors(call):
            return str(answer["Id"])

    async def create_file_holder(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        """Create a container like `of` that holds files and never runs, or find the existing one; returns its id.

        A cancelled caller waits for the creation for a while: see `_finish_creation`.
        """
        return await _finish_creation(self._create_file_holder(of, name, labels))

    async def _create_file_holder(self, of: str, name: str, labels: Mapping[str, str]) -> str:
        call = "create a container"
        container = await self._inspect_existing(of, call)
        try:
            answer: Json = await self._connection.call(
                call,
                "POST",
                "containers/create",
                params={"name": path_segment(name)},
                body=translate.file_holder_request(container, labels),
            )
        except EngineRejected as rejection:
            existing = await self.inspect(name) if rejection.status == CONFLICT else None
            if existing is None or existing.labels.get(LABEL_OPERATION) != labels[LABEL_OPERATION]:
                raise
            return existing.id
        with engine_errors(call):
            return str(answer["Id"])


async def _finish_creation(creation: Coroutine[Any, Any, str]) -> str:
    """Run `creation` and return the container's id.

    The engine continues a creation whose caller has disconnected. So a cancelled caller waits
    `_CREATE_GRACE_SECONDS` for the end, and the undo that follows finds the container.
    """
    task = asyncio.ensure_future(creation)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,), timeout=_CREATE_GRACE_SECONDS)
        task.cancel()
        # Retrieve the result, which is no longer needed.
        await asyncio.gather(task, return_exceptions=True)
        raise
    finally:
        task.cancel()
