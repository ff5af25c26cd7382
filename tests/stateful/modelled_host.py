"""A host with one daemon behind an engine proxy, and the model of its expected containers and volumes.

Every method changes the host and the model alike. Where several outcomes are allowed, because the daemon was killed or
an engine call failed, the model takes over the one that the host shows; any other outcome is a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2, volume_pb2

from tests.calls import Caller, Failure, failure, failure_of
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.engine.loop_devices import loop_devices_below
from tests.rig import Daemon, EngineProxy, Rig
from tests.rig.patience import limit
from tests.stateful.model import GROUP, ExpectedContainer, ExpectedVolume, State, containers_mounting
from tests.stateful.observation import EngineView, Observation, files_of, writable_layer
from tests.stateful.requests import spec_of

# The reasons of errors that a caller may get when the engine refuses or drops a call, or the daemon is killed.
_REASONS_UNDER_FAULTS = {
    "ENGINE_UNAVAILABLE", "ENGINE_REJECTED", "START_FAILED", "LAYER_CARRY_FAILED", "SNAPSHOT_FAILED",
    "IMAGE_NOT_FOUND", "CONTAINER_NOT_RUNNING", "SHUTTING_DOWN", "STORE_UNAVAILABLE", "",
}  # fmt: skip

_MIB = 1 << 20
# The size that `df` shows may differ from that of the volume by this share, which the filesystem needs.
_SIZE_TOLERANCE = 0.02

Act = Callable[[Caller], Awaitable[object]]
ExpectedState = ExpectedContainer | ExpectedVolume | None


@dataclass(frozen=True)
class Change:
    """A request, and the expected states of its container or volume before and after it; None: it does not exist."""

    name: str
    act: Act
    before: ExpectedState
    after: ExpectedState
    # Other containers that the request changes, in their state after it.
    also: tuple[ExpectedContainer, ...] = ()

    @property
    def is_of_volume(self) -> bool:
        """Whether the request is about a volume."""
        return isinstance(self.before, ExpectedVolume) or isinstance(self.after, ExpectedVolume)


class ModelledHost:
    """See the module's docstring."""

    def __init__(self, rig: Rig, proxy: EngineProxy, caller: Caller, daemon: Daemon, flags: tuple[str, ...]) -> None:
        self.rig = rig
        self.proxy = proxy
        self.caller = caller
        self.daemon = daemon
        self.flags = flags
        self.node = flags[flags.index("--node-name") + 1]
        root = rig.engine.call("GET", "/info")["DockerRootDir"]
        self.snapshots = Path(root, "gpudock", "snapshots", self.node)
        self.containers: dict[str, ExpectedContainer] = {}
        self.volumes: dict[str, ExpectedVolume] = {}
        # The last observation without a running operation.
        self._observation = Observation.empty()

    @classmethod
    async def open(cls, rig: Rig, proxy: EngineProxy) -> ModelledHost:
        """Start a daemon with a store prefix, a node name and a state folder of its own."""
        flags = (
            *FAST_FLAGS,
            *own_state_flags(),
            "--engine-timeout",
            f"{limit(5):g}",
            "--orphan-grace",
            "0",
            "--reconcile-interval",
            "1",
            "--keep-revisions",
            "6",
            # XFS can only shrink by a copy.
            "--volume-backend",
            "loop",
            "--volume-filesystem",
            "xfs",
        )
        daemon = await rig.start_daemon(*flags, docker_host=proxy.url)
        return cls(rig, proxy, Caller(daemon.target), daemon, flags)

    async def close(self) -> None:
        """Delete everything, and assert that nothing is left; stops the daemon."""
        self.proxy.faults.clear()
        try:
            await self.caller.delete_all()
            assert await self.caller.free_gpus() == 8
            assert not EngineView.read(self.rig, self.node).by_name
            assert not self._engine_volumes()
            assert not loop_devices_below(self.daemon.state_dir)
            for container in self.containers.values():
                assert not (self.snapshots / container.uid).exists()
        finally:
            await self.caller.channel.close(None)
            await asyncio.to_thread(self.daemon.stop)

    # -- checks --------------------------------------------------------------------------------------------------------

    async def check(self, *names: str) -> None:
        """Observe the host and compare these containers and volumes, or all, with the model."""
        self._observation = await self._observe()
        for name in names or tuple(self.containers):
            if name in self.containers:
                differences = await self._differences(self.containers[name], self._observation)
                assert not differences, f"{name}: {differences}"
        await self.check_settled(*(names or (*self.containers, *self.volumes)))
        if not names:
            await asyncio.to_thread(self._check_host, self._observation)

    async def check_settled(self, *names: str) -> None:
        """Compare the last observation with the model, for what concerns several containers and volumes."""
        observation = self._observation
        for uuid, users in observation.engine.users_of_running_gpus.items():
            assert len(users) == 1, f"GPU {uuid} is used by {users}"
        assert observation.containers.keys() == self.containers.keys()
        assert observation.volumes.keys() == self.volumes.keys()
        assert set(observation.holders.values()) <= self.containers.keys(), observation.holders
        unknown = observation.engine.by_name.keys() - self.containers.keys()
        assert not unknown, f"engine containers of containers that the model does not have: {unknown}"
        mounted = {volume for name in names if name in self.containers for volume in self.containers[name].spec.volumes}
        for name in mounted | (self.volumes.keys() & set(names)):
            differences = await asyncio.to_thread(self._volume_differences, self.volumes[name], observation)
            shown = list(observation.volumes[name].attached_containers)
            users = containers_mounting(self.containers.values(), name)
            assert (differences, shown) == ([], users), name

    def _check_host(self, observation: Observation) -> None:
        """Assert that each volume has one engine volume or loop device, and that there are no others."""
        made = {volume.mountpoint for name, volume in observation.volumes.items() if not self.volumes[name].adopted}
        assert self._engine_volumes() == made
        sized = [volume.name for volume in self.volumes.values() if volume.size_mib]
        loops = loop_devices_below(self.daemon.state_dir)
        assert len(loops) == len(sized), f"{loops} for {sized}"

    def _engine_volumes(self) -> set[str]:
        query = {"filters": f'{{"label":["gpudock.node={self.node}"]}}'}
        return {
            volume["Mountpoint"] for volume in self.rig.engine.call("GET", "/volumes", query=query)["Volumes"] or []
        }

    async def _observe(self) -> Observation:
        return await Observation.read(self.rig, self.node, self.caller)

    async def _differences(self, expected: ExpectedContainer, observation: Observation) -> list[str]:
        """The differences between a container and the model, in words."""
        now = observation.containers[expected.name]
        state = container_pb2.ContainerState.Name(now.status.state).removeprefix("CONTAINER_STATE_")
        differences = []
        if state != expected.state:
            differences.append(f"is {state}, not {expected.state}: {now.status.message}")
        if (now.revision, spec_of(now)) != (expected.revision, expected.spec):
            differences.append(f"is at {now.revision} {spec_of(now)}, not at {expected.revision} {expected.spec}")
        held = sorted(uuid for uuid, name in observation.holders.items() if name == expected.name)
        if (
            held != sorted(now.status.gpu_uuids)
            or len(held) != expected.gpus
            or now.status.holds_resources != expected.holds
        ):
            differences.append(
                f"holds {held}, shows {list(now.status.gpu_uuids)}, is to have {expected.gpus} ({expected.holds})"
            )
        if expected.state is State.FAILED:
            return differences + (["is FAILED and holds GPUs"] if held else [])
        ours = observation.engine.by_name.get(expected.name, [])
        if [found["Id"] for found in ours] != [now.status.engine_id]:
            return [*differences, f"has the engine containers {[found['Name'] for found in ours]}"]
        if ours[0]["State"]["Running"] != expected.runs:
            # The record may be older than the state of the engine.
            differences.append(f"is {ours[0]['State']['Status']} in the engine")
        found = files_of(writable_layer(ours[0]))
        if found != expected.files:
            differences.append(f"has the files {found}, not {expected.files}")
        if (mounted := observation.mounts_of(ours[0])) != dict(expected.spec.mounts):
            differences.append(f"has {mounted} mounted, not {expected.spec.mounts}")
        return differences + await self._history_differences(expected)

    def _volume_differences(self, expected: ExpectedVolume, observation: Observation) -> list[str]:
        """The differences between a volume and the model, in words."""
        volume = observation.volumes[expected.name]
        if volume.state != volume_pb2.VOLUME_STATE_READY or volume.operation_id:
            return [f"is {volume_pb2.VolumeState.Name(volume.state)}, with the operation {volume.operation_id!r}"]
        differences = []
        size, backend = expected.size_mib * _MIB, volume_pb2.VOLUME_BACKEND_LOOP
        if volume.backend != (backend if size else volume_pb2.VOLUME_BACKEND_PLAIN):
            differences.append(f"is made of {volume_pb2.VolumeBackend.Name(volume.backend)}")
        if (volume.size_bytes, volume.revision) != (size, len(expected.sizes)):
            differences.append(f"has {volume.size_bytes} bytes at revision {volume.revision}, not {expected.sizes} MiB")
        shown = observation.visible_size(volume) if size else None
        if shown is not None and abs(shown - size) > size * _SIZE_TOLERANCE:
            differences.append(f"shows a size of {shown}, not {size}")
        found = observation.files_in_volume(volume, self.daemon.state_dir / "volumes" / volume.uid / "device")
        if found != expected.files:
            differences.append(f"has the files {found}, not {expected.files}")
        return differences

    async def _history_differences(self, expected: ExpectedContainer) -> list[str]:
        differences = []
        history = {found.revision: found for found in await self.caller.revisions(expected.name)}
        if sorted(history) != sorted([*expected.past, expected.revision]):
            return [f"has the revisions {sorted(history)}, not {sorted([*expected.past, expected.revision])}"]
        for number, past in expected.past.items():
            tree = self.snapshots / expected.uid / str(number) / "tree"
            kept = tuple(sorted(files_of(tree).items())) if tree.is_dir() else None
            if kept != past.files or history[number].HasField("snapshot") != (kept is not None):
                differences.append(f"revision {number} kept {kept}, not {past.files}")
        return differences

    async def settle(self, name: str, *candidates: ExpectedContainer | None) -> None:
        """Wait for running operations, then take the candidate that equals the observation over into the model.

        The candidate None: the container does not exist. Raises AssertionError if no candidate equals it.
        """
        await self.caller.until_idle()
        self.proxy.faults.clear()
        self._observation = observation = await self._observe()
        exists = name in observation.containers
        found: list[object] = []
        for candidate in candidates:
            if candidate is None or not exists:
                differences = _existence_differences(expected=candidate is not None, exists=exists)
            else:
                differences = await self._differences(candidate, observation)
            if not differences:
                if candidate is None:
                    self.containers.pop(name, None)
                else:
                    self.containers[name] = candidate
                return
            found.append(differences)
        raise AssertionError(f"{name} equals none of the allowed outcomes: {found}")

    async def settle_volume(self, name: str, *candidates: ExpectedVolume | None) -> None:
        """As `settle`, for a volume. A volume in state DELETING is deleted by a second call."""
        await self.caller.until_idle()
        self.proxy.faults.clear()
        self._observation = observation = await self._observe()
        volume = observation.volumes.get(name)
        if None in candidates and volume is not None and volume.state == volume_pb2.VOLUME_STATE_DELETING:
            await self.caller.delete_volume(name)
            self._observation = observation = await self._observe()
            volume = observation.volumes.get(name)
        found: list[object] = []
        for candidate in candidates:
            if candidate is None or volume is None:
                differences = _existence_differences(expected=candidate is not None, exists=volume is not None)
            else:
                differences = await asyncio.to_thread(self._volume_differences, candidate, observation)
            if not differences:
                if candidate is None:
                    self.volumes.pop(name, None)
                else:
                    self.volumes[name] = candidate
                return
            found.append(differences)
        raise AssertionError(f"{name} equals none of the allowed outcomes: {found}")

    # -- changes -------------------------------------------------------------------------------------------------------

    async def act(self, change: Change) -> None:
        """Make a request that must succeed or, after an engine fault, be undone, as its caller's result says."""
        error = await _failure_or_none(change.act(self.caller))
        assert error is None or error.reason in _REASONS_UNDER_FAULTS, error
        assert error is None or self.fault_occurred, f"failed without an engine fault: {error}"
        if error is None:
            await self._settle_change(change, change.after)
        elif _outcome_is_unknown(error):
            await self._settle_change(change, change.before, change.after, failed=True)
        else:
            await self._settle_change(change, change.before, failed=True)

    @property
    def fault_occurred(self) -> bool:
        """Whether a request has met a fault since the faults were cleared."""
        return self.proxy.faults.met

    async def _settle_change(self, change: Change, *ends: ExpectedState, failed: bool = False) -> None:
        """Take over which of `ends` has come about. With `failed`, running containers may have been left stopped."""
        for container in change.also:
            # The change of this container may have succeeded although the request failed.
            others = (container,) if ends == (change.after,) else (self.containers[container.name], container)
            await self.settle(container.name, *others, *(_left_by_failure(others, None) if failed else ()))
        if change.is_of_volume:
            await self.settle_volume(change.name, *(end for end in ends if not isinstance(end, ExpectedContainer)))
            return
        containers = [end for end in ends if not isinstance(end, ExpectedVolume)]
        await self.settle(change.name, *containers, *(_left_by_failure(containers, change.before) if failed else ()))

    async def kill_during(self, change: Change, seconds: float) -> bool:
        """Make a request and kill the daemon `seconds` later; the next daemon completes or undoes the operation.

        Returns whether the daemon was killed before the request had ended.
        """
        request = asyncio.ensure_future(_failure_or_none(change.act(self.caller)))
        await asyncio.sleep(seconds)
        ended = request.done()
        succeeded = ended and request.result() is None
        await self.restart(kill=True)
        await request
        await self._settle_change(change, *([change.after] if succeeded else [change.before, change.after]))
        return not ended

    async def cancel_during(self, change: Change, seconds: float) -> bool:
        """Make a request and cancel its operation `seconds` later; returns whether the operation was undone."""
        request = asyncio.ensure_future(_failure_or_none(change.act(self.caller)))
        await asyncio.sleep(seconds)
        while not request.done():
            if running := await self._running_operations():
                cancel = operation_service_pb2.CancelOperationRequest(id=running[0].id)
                refused = await _failure_or_none(self.caller.operations.CancelOperation(cancel))
                assert refused is None or refused.reason == "OPERATION_NOT_CANCELLABLE", refused
                break
            await asyncio.sleep(0.01)
        error = await request
        assert error is None or error.reason == "OPERATION_CANCELLED", error
        await self._settle_change(change, change.after if error is None else change.before)
        return error is not None

    async def _running_operations(self) -> list[operation_pb2.Operation]:
        running = operation_service_pb2.OperationFilter(states=[operation_pb2.OPERATION_STATE_RUNNING])
        listed = await self.caller.operations.ListOperations(
            operation_service_pb2.ListOperationsRequest(filter=running)
        )
        return list(listed.operations)

    async def refused(self, act: Act, reason: str, holders: Collection[str] = ()) -> None:
        """Make a request that must fail with `reason` and, if given, name these `holders`."""
        error = await failure(act(self.caller))
        assert error.reason == reason, error
        if holders:
            assert error.metadata["holders"].split(",") == sorted(holders), error

    async def restart(self, *, kill: bool) -> None:
        """Stop or kill the daemon, and start its successor."""
        await asyncio.to_thread(self.daemon.kill9 if kill else self.daemon.stop)
        self.proxy.faults.clear()
        old = self.daemon
        self.daemon = await self.rig.start_daemon(
            *self.flags, docker_host=self.proxy.url, state_dir=old.state_dir, socket=old.socket
        )
        await self.caller.channel.close(None)
        self.caller = Caller(self.daemon.target)

    async def write(self, name: str, file: str, content: str | None) -> None:
        """Write a file of a container; `content` None deletes it."""
        expected = self.containers[name]
        if file == GROUP:
            script = f"rm -f {GROUP}"
            expected.files[GROUP] = "deleted"
        elif content is None:
            script = f"rm -f /work/{file}"
            expected.files.pop(file, None)
        else:
            script = f"mkdir -p /work && printf %s '{content}' > /work/{file}"
            expected.files[file] = content
        await self.caller.shell(name, script)

    async def write_in_volume(self, name: str, target: str, file: str, content: str | None) -> None:
        """Write a file of a volume that a container mounts at `target`; `content` None deletes it."""
        files = self.volumes[dict(self.containers[name].spec.mounts)[target]].files
        if content is None:
            files.pop(file, None)
            script = f"rm -f {target}/{file}"
        else:
            files[file] = content
            script = f"printf %s '{content}' > {target}/{file}"
        await self.caller.shell(name, script)


def _existence_differences(*, expected: bool, exists: bool) -> list[str]:
    return [] if expected == exists else ["exists" if exists else "does not exist"]


async def _failure_or_none(call: Awaitable[object]) -> Failure | None:
    """The error of a call; None if it succeeds."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    return None


def _outcome_is_unknown(error: Failure) -> bool:
    """Whether an error does not say if the request was executed."""
    message = error.message or "the connection broke"
    return "does not answer" in message or "shutting down" in message or "connection" in message.lower()


def _left_by_failure(ends: Iterable[ExpectedContainer | None], before: ExpectedState) -> list[ExpectedContainer]:
    """Further states in which a failed request may leave its container."""
    ran = [container for container in ends if container and container.runs]
    # A container that was stopped by the operation and could not be started again.
    left = [_with_state(container, state) for state in (State.EXITED, State.STOPPED) for container in ran]
    if ran and isinstance(before, ExpectedContainer) and before.state is State.PAUSED:
        # A paused container is unpaused before it is stopped.
        left.append(_with_state(before, State.RUNNING))
    return left


def _with_state(expected: ExpectedContainer, state: State) -> ExpectedContainer:
    other = expected.copy()
    other.state = state
    return other
