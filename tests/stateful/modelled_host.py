"""One daemon behind a proxy that can harm it, and what the test knows of its containers.

Every method does one thing to the world and to the model. Where an outcome is open (the daemon was killed, the engine
was fault_occurred) the world is asked which of the possible ones came about; anything else is a failure.
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
from tests.stateful.model import GROUP, ExpectedContainer, ExpectedVolume, State, containers_mounting
from tests.stateful.observation import EngineView, Observation, files_of, writable_layer
from tests.stateful.requests import spec_of

# What a caller may be told when the engine refuses or drops a call, or the daemon dies.
_REASONS_UNDER_FAULTS = {
    "ENGINE_UNAVAILABLE", "ENGINE_REJECTED", "START_FAILED", "LAYER_CARRY_FAILED", "SNAPSHOT_FAILED",
    "IMAGE_NOT_FOUND", "CONTAINER_NOT_RUNNING", "SHUTTING_DOWN", "STORE_UNAVAILABLE", "",
}  # fmt: skip

_MIB = 1 << 20
# `df` may differ that much from the size, by what the filesystem takes for itself.
_SIZE_TOLERANCE = 0.02

Act = Callable[[Caller], Awaitable[object]]
ExpectedState = ExpectedContainer | ExpectedVolume | None


@dataclass(frozen=True)
class Change:
    """A request, and the two ends that it can come to. None: what it names is not there."""

    name: str
    act: Act
    before: ExpectedState
    after: ExpectedState
    # Other containers that it changes on the way, as they are then.
    also: tuple[ExpectedContainer, ...] = ()

    @property
    def is_of_volume(self) -> bool:
        """Whether what it names is one."""
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
        self.known: dict[str, ExpectedContainer] = {}
        self.volumes: dict[str, ExpectedVolume] = {}
        # What was seen last, once nothing was under way.
        self._observation = Observation.empty()

    @classmethod
    async def open(cls, rig: Rig, proxy: EngineProxy) -> ModelledHost:
        """With a daemon that has a state of its own."""
        flags = (
            *FAST_FLAGS,
            *own_state_flags(),
            "--engine-timeout",
            "5",
            "--orphan-grace",
            "0",
            "--reconcile-interval",
            "1",
            "--keep-revisions",
            "6",
            # One that can only shrink by a copy.
            "--volume-backend",
            "loop",
            "--volume-filesystem",
            "xfs",
        )
        daemon = await rig.start_daemon(*flags, docker_host=proxy.url)
        return cls(rig, proxy, Caller(daemon.target), daemon, flags)

    async def close(self) -> None:
        """Everything is deleted, and nothing is left."""
        self.proxy.faults.clear()
        try:
            await self.caller.delete_all()
            assert await self.caller.free_gpus() == 8
            assert not EngineView.read(self.rig, self.node).by_name
            assert not self._engine_volumes()
            assert not loop_devices_below(self.daemon.state_dir)
            for container in self.known.values():
                assert not (self.snapshots / container.uid).exists()
        finally:
            await self.caller.channel.close(None)
            await asyncio.to_thread(self.daemon.stop)

    # -- what must be true ---------------------------------------------------------------------------------------------

    async def check(self, *names: str) -> None:
        """Of these containers and volumes, or of all: records, files, snapshots, engine and claims agree."""
        self._observation = await self._observe()
        for name in names or tuple(self.known):
            if name in self.known:
                wrong = await self._differences(self.known[name], self._observation)
                assert not wrong, f"{name}: {wrong}"
        await self.check_settled(*(names or (*self.known, *self.volumes)))
        if not names:
            await asyncio.to_thread(self._check_host, self._observation)

    async def check_settled(self, *names: str) -> None:
        """What was just settled agrees with all else, as it was seen then."""
        observation = self._observation
        for uuid, users in observation.engine.users_of_running_gpus.items():
            assert len(users) == 1, f"card {uuid} runs in {users}"
        assert observation.containers.keys() == self.known.keys()
        assert observation.volumes.keys() == self.volumes.keys()
        assert set(observation.holders.values()) <= self.known.keys(), observation.holders
        unknown = observation.engine.by_name.keys() - self.known.keys()
        assert not unknown, f"engine containers of containers that the model does not have: {unknown}"
        mounted = {volume for name in names if name in self.known for volume in self.known[name].spec.volumes}
        for name in mounted | (self.volumes.keys() & set(names)):
            wrong = await asyncio.to_thread(self._wrong_volume, self.volumes[name], observation)
            shown = list(observation.volumes[name].attached_containers)
            users = containers_mounting(self.known.values(), name)
            assert (wrong, shown) == ([], users), name

    def _check_host(self, observation: Observation) -> None:
        """What volumes are made of is there once, and nothing else is."""
        made = {seen.mountpoint for name, seen in observation.volumes.items() if not self.volumes[name].adopted}
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
        """What is not as expected, in words."""
        now = observation.containers[expected.name]
        state = container_pb2.ContainerState.Name(now.status.state).removeprefix("CONTAINER_STATE_")
        wrong = []
        if state != expected.state:
            wrong.append(f"is {state}, not {expected.state}: {now.status.message}")
        if (now.revision, spec_of(now)) != (expected.revision, expected.spec):
            wrong.append(f"is at {now.revision} {spec_of(now)}, not at {expected.revision} {expected.spec}")
        held = sorted(uuid for uuid, name in observation.holders.items() if name == expected.name)
        if (
            held != sorted(now.status.gpu_uuids)
            or len(held) != expected.cards
            or now.status.holds_resources != expected.holds
        ):
            wrong.append(
                f"holds {held}, shows {list(now.status.gpu_uuids)}, is to have {expected.cards} ({expected.holds})"
            )
        if expected.state is State.FAILED:
            return wrong + (["holds something, and is lost"] if held else [])
        ours = observation.engine.by_name.get(expected.name, [])
        if [found["Id"] for found in ours] != [now.status.engine_id]:
            return [*wrong, f"has the engine containers {[found['Name'] for found in ours]}"]
        if ours[0]["State"]["Running"] != expected.runs:
            # Else a record that has not yet followed would be believed.
            wrong.append(f"is {ours[0]['State']['Status']} in the engine")
        found = files_of(writable_layer(ours[0]))
        if found != expected.files:
            wrong.append(f"has the files {found}, not {expected.files}")
        if (mounted := observation.mounts_of(ours[0])) != dict(expected.spec.mounts):
            wrong.append(f"has {mounted} mounted, not {expected.spec.mounts}")
        return wrong + await self._wrong_history(expected)

    def _wrong_volume(self, expected: ExpectedVolume, observation: Observation) -> list[str]:
        """What of a volume is not as expected, in words."""
        seen = observation.volumes[expected.name]
        if seen.state != volume_pb2.VOLUME_STATE_READY or seen.operation_id:
            return [f"is {volume_pb2.VolumeState.Name(seen.state)}, with the operation {seen.operation_id!r}"]
        wrong = []
        size, backend = expected.size_mib * _MIB, volume_pb2.VOLUME_BACKEND_LOOP
        if seen.backend != (backend if size else volume_pb2.VOLUME_BACKEND_PLAIN):
            wrong.append(f"is made of {volume_pb2.VolumeBackend.Name(seen.backend)}")
        if (seen.size_bytes, seen.revision) != (size, len(expected.sizes)):
            wrong.append(f"has {seen.size_bytes} bytes at revision {seen.revision}, not {expected.sizes} MiB")
        shown = observation.visible_size(seen) if size else None
        if shown is not None and abs(shown - size) > size * _SIZE_TOLERANCE:
            wrong.append(f"shows a size of {shown}, not {size}")
        found = observation.files_in_volume(seen, self.daemon.state_dir / "volumes" / seen.uid / "device")
        if found != expected.files:
            wrong.append(f"has the files {found}, not {expected.files}")
        return wrong

    async def _wrong_history(self, expected: ExpectedContainer) -> list[str]:
        wrong = []
        history = {found.revision: found for found in await self.caller.revisions(expected.name)}
        if sorted(history) != sorted([*expected.past, expected.revision]):
            return [f"has the revisions {sorted(history)}, not {sorted([*expected.past, expected.revision])}"]
        for number, past in expected.past.items():
            tree = self.snapshots / expected.uid / str(number) / "tree"
            kept = tuple(sorted(files_of(tree).items())) if tree.is_dir() else None
            if kept != past.files or history[number].HasField("snapshot") != (kept is not None):
                wrong.append(f"revision {number} kept {kept}, not {past.files}")
        return wrong

    async def settle(self, name: str, *candidates: ExpectedContainer | None) -> None:
        """Find out which of the candidates came about (None: the container is not there), and believe that one."""
        await self.caller.until_idle()
        self.proxy.faults.clear()
        self._observation = observation = await self._observe()
        there = name in observation.containers
        found: list[object] = []
        for candidate in candidates:
            if candidate is None or not there:
                wrong = [] if (candidate is None) == (not there) else ["it is there" if there else "it is not there"]
            else:
                wrong = await self._differences(candidate, observation)
            if not wrong:
                if candidate is None:
                    self.known.pop(name, None)
                else:
                    self.known[name] = candidate
                return
            found.append(wrong)
        raise AssertionError(f"{name} is none of what it could be: {found}")

    async def settle_volume(self, name: str, *candidates: ExpectedVolume | None) -> None:
        """The same of a volume. One whose deletion was broken off in the middle is deleted by the same call again."""
        await self.caller.until_idle()
        self.proxy.faults.clear()
        self._observation = observation = await self._observe()
        seen = observation.volumes.get(name)
        if None in candidates and seen is not None and seen.state == volume_pb2.VOLUME_STATE_DELETING:
            await self.caller.delete_volume(name)
            self._observation = observation = await self._observe()
            seen = observation.volumes.get(name)
        found: list[object] = []
        for candidate in candidates:
            if candidate is None or seen is None:
                wrong = [] if (candidate is None) == (seen is None) else ["it is there" if seen else "it is not there"]
            else:
                wrong = await asyncio.to_thread(self._wrong_volume, candidate, observation)
            if not wrong:
                if candidate is None:
                    self.volumes.pop(name, None)
                else:
                    self.volumes[name] = candidate
                return
            found.append(wrong)
        raise AssertionError(f"{name} is none of what it could be: {found}")

    # -- what is done --------------------------------------------------------------------------------------------------

    async def act(self, change: Change) -> None:
        """Do something that must succeed, or, where something was fault_occurred, be undone; and be told which."""
        told = await _failure_or_none(change.act(self.caller))
        assert told is None or told.reason in _REASONS_UNDER_FAULTS, told
        assert told is None or self.fault_occurred, f"it failed with nothing fault_occurred: {told}"
        if told is None:
            await self._settle_change(change, change.after)
        elif _outcome_is_unknown(told):
            await self._settle_change(change, change.before, change.after, failed=True)
        else:
            await self._settle_change(change, change.before, failed=True)

    @property
    def fault_occurred(self) -> bool:
        """Whether a request has met a fault since the faults were cleared."""
        return self.proxy.faults.met

    async def _settle_change(self, change: Change, *ends: ExpectedState, failed: bool = False) -> None:
        """Find out to which of these ends it came. With `failed` what ran may have been left stopped."""
        for container in change.also:
            # It may have been changed before the rest failed, whatever was told.
            others = (container,) if ends == (change.after,) else (self.known[container.name], container)
            await self.settle(container.name, *others, *(_left_by_failure(others, None) if failed else ()))
        if change.is_of_volume:
            await self.settle_volume(change.name, *(end for end in ends if not isinstance(end, ExpectedContainer)))
            return
        containers = [end for end in ends if not isinstance(end, ExpectedVolume)]
        await self.settle(change.name, *containers, *(_left_by_failure(containers, change.before) if failed else ()))

    async def kill_during(self, change: Change, seconds: float) -> bool:
        """`kill -9` so many seconds after it has begun; the next daemon brings it to one of its two ends.

        Whether the daemon was killed before it had ended.
        """
        # What the caller is told is that the connection broke, or the outcome, where it was quicker.
        going = asyncio.ensure_future(_failure_or_none(change.act(self.caller)))
        await asyncio.sleep(seconds)
        ended = going.done()
        succeeded = ended and going.result() is None
        await self.restart(kill=True)
        await going
        await self._settle_change(change, *([change.after] if succeeded else [change.before, change.after]))
        return not ended

    async def cancel_during(self, change: Change, seconds: float) -> bool:
        """CancelOperation so long after it began: it is undone, or says that it cannot be. Whether it was undone."""
        going = asyncio.ensure_future(_failure_or_none(change.act(self.caller)))
        await asyncio.sleep(seconds)
        while not going.done():
            if under_way := await self._running_operations():
                request = operation_service_pb2.CancelOperationRequest(id=under_way[0].id)
                refused = await _failure_or_none(self.caller.operations.CancelOperation(request))
                assert refused is None or refused.reason == "OPERATION_NOT_CANCELLABLE", refused
                break
            await asyncio.sleep(0.01)
        told = await going
        assert told is None or told.reason == "OPERATION_CANCELLED", told
        await self._settle_change(change, change.after if told is None else change.before)
        return told is not None

    async def _running_operations(self) -> list[operation_pb2.Operation]:
        wanted = operation_service_pb2.OperationFilter(states=[operation_pb2.OPERATION_STATE_RUNNING])
        listed = await self.caller.operations.ListOperations(operation_service_pb2.ListOperationsRequest(filter=wanted))
        return list(listed.operations)

    async def refused(self, act: Act, reason: str, holders: Collection[str] = ()) -> None:
        """Do something that must be refused, for that reason; nothing is changed."""
        told = await failure(act(self.caller))
        assert told.reason == reason, told
        if holders:
            assert told.metadata["holders"].split(",") == sorted(holders), told

    async def restart(self, *, kill: bool) -> None:
        """Another daemon in the place of this one."""
        await asyncio.to_thread(self.daemon.kill9 if kill else self.daemon.stop)
        self.proxy.faults.clear()
        old = self.daemon
        self.daemon = await self.rig.start_daemon(
            *self.flags, docker_host=self.proxy.url, state_dir=old.state_dir, socket=old.socket
        )
        await self.caller.channel.close(None)
        self.caller = Caller(self.daemon.target)

    async def write(self, name: str, file: str, content: str | None) -> None:
        """Write a file, or (None) delete one."""
        expected = self.known[name]
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
        """The same with a file of a volume that it mounts."""
        files = self.volumes[dict(self.known[name].spec.mounts)[target]].files
        if content is None:
            files.pop(file, None)
            script = f"rm -f {target}/{file}"
        else:
            files[file] = content
            script = f"printf %s '{content}' > {target}/{file}"
        await self.caller.shell(name, script)


async def _failure_or_none(call: Awaitable[object]) -> Failure | None:
    """How it failed; None: it did not."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    return None


def _outcome_is_unknown(told: Failure) -> bool:
    """Whether what a caller is told says neither that it was done nor that it was not."""
    message = told.message or "the connection broke"
    return "does not answer" in message or "shutting down" in message or "connection" in message.lower()


def _left_by_failure(ends: Iterable[ExpectedContainer | None], before: ExpectedState) -> list[ExpectedContainer]:
    """How else what has failed may be left, and be told to be."""
    ran = [container for container in ends if container and container.runs]
    # A container that was stopped on the way, or could not be started again, is told as it is.
    left = [_with_state(container, state) for state in (State.EXITED, State.STOPPED) for container in ran]
    if ran and isinstance(before, ExpectedContainer) and before.state is State.PAUSED:
        # What is frozen is thawed to be stopped.
        left.append(_with_state(before, State.RUNNING))
    return left


def _with_state(expected: ExpectedContainer, state: State) -> ExpectedContainer:
    other = expected.copy()
    other.state = state
    return other
