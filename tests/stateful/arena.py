"""One daemon behind a proxy that can harm it, and what the test knows of its containers.

Every method does one thing to the world and to the model. Where an outcome is open (the daemon was killed, the engine
was harmed) the world is asked which of the possible ones came about; anything else is a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from gpudock.v1 import container_pb2

from tests.calls import Caller, failure_of
from tests.conftest import FAST, own_state
from tests.faults.invariants import cards_of
from tests.rig import Daemon, EngineProxy, HttpStatusError, Rig
from tests.stateful.looking import EngineSide, files_of, upper_of
from tests.stateful.model import GROUP, Expected, Past, Spec, State

_PORT = container_pb2.PortRequest(container_port=80)
_NEVER = container_pb2.SNAPSHOT_POLICY_NEVER
# What a caller may be told when the engine refuses or drops a call, or the daemon dies.
_HARMED = {
    "ENGINE_UNAVAILABLE", "ENGINE_REJECTED", "START_FAILED", "LAYER_CARRY_FAILED", "SNAPSHOT_FAILED",
    "IMAGE_NOT_FOUND", "CONTAINER_NOT_RUNNING", "SHUTTING_DOWN", "STORE_UNAVAILABLE", "",
}  # fmt: skip

# Within so many seconds an event is noticed and, where a rule says so, repaired.
_NOTICED_S = 20.0

Act = Callable[[Caller], Awaitable[object]]


class Arena:
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
        self.known: dict[str, Expected] = {}

    @classmethod
    async def open(cls, rig: Rig, proxy: EngineProxy) -> Arena:
        """With a daemon that has a state of its own."""
        flags = (
            *FAST,
            *own_state(),
            "--engine-timeout",
            "5",
            "--orphan-grace",
            "0",
            "--reconcile-interval",
            "1",
            "--keep-revisions",
            "6",
        )
        daemon = await rig.start_daemon(*flags, docker_host=proxy.url)
        return cls(rig, proxy, Caller(daemon.target), daemon, flags)

    async def close(self) -> None:
        """Everything is deleted, and nothing is left."""
        self.proxy.faults.clear()
        try:
            await self.caller.delete_all()
            assert await self.caller.free_gpus() == 8
            assert not EngineSide.look(self.rig, self.node).by_name
            for one in self.known.values():
                assert not (self.snapshots / one.uid).exists()
        finally:
            await self.caller.channel.close(None)
            await asyncio.to_thread(self.daemon.stop)

    # -- what must be true ---------------------------------------------------------------------------------------------

    async def check(self, *names: str) -> None:
        """Of these containers, or of all: records, files, snapshots, engine and claims agree."""
        engine = await asyncio.to_thread(EngineSide.look, self.rig, self.node)
        for uuid, users in engine.running_cards.items():
            assert len(users) == 1, f"card {uuid} runs in {users}"
        holders = {uuid: name for uuid, name in (await self.caller.holders()).items() if name}
        for name in names or tuple(self.known):
            if name in self.known:
                wrong = await self._differences(self.known[name], engine, holders)
                assert not wrong, f"{name}: {wrong}"
        assert set(holders.values()) <= set(self.known), holders
        assert set(engine.by_name) <= set(self.known), f"nobody's: {sorted(set(engine.by_name) - set(self.known))}"

    async def _differences(self, one: Expected, engine: EngineSide, holders: dict[str, str]) -> list[str]:
        """What is not as expected, in words."""
        now = await self.caller.get(one.name)
        state = container_pb2.ContainerState.Name(now.status.state).removeprefix("CONTAINER_STATE_")
        wrong = []
        if state != one.state:
            wrong.append(f"is {state}, not {one.state}: {now.status.message}")
        if (now.revision, _spec_of(now)) != (one.revision, one.spec):
            wrong.append(f"is at {now.revision} {_spec_of(now)}, not at {one.revision} {one.spec}")
        held = sorted(uuid for uuid, name in holders.items() if name == one.name)
        if held != sorted(now.status.gpu_uuids) or len(held) != one.cards or now.status.holds_resources != one.holds:
            wrong.append(f"holds {held}, shows {list(now.status.gpu_uuids)}, is to have {one.cards} ({one.holds})")
        if one.state is State.FAILED:
            return wrong + (["holds something, and is lost"] if held else [])
        ours = engine.by_name.get(one.name, [])
        if [found["Id"] for found in ours] != [now.status.engine_id]:
            return [*wrong, f"has the engine containers {[found['Name'] for found in ours]}"]
        found = files_of(upper_of(ours[0]))
        if found != one.files:
            wrong.append(f"has the files {found}, not {one.files}")
        return wrong + await self._wrong_history(one)

    async def _wrong_history(self, one: Expected) -> list[str]:
        wrong = []
        history = {found.revision: found for found in await self.caller.revisions(one.name)}
        if sorted(history) != sorted([*one.past, one.revision]):
            return [f"has the revisions {sorted(history)}, not {sorted([*one.past, one.revision])}"]
        for number, past in one.past.items():
            tree = self.snapshots / one.uid / str(number) / "tree"
            kept = tuple(sorted(files_of(tree).items())) if tree.is_dir() else None
            if kept != past.files or history[number].HasField("snapshot") != (kept is not None):
                wrong.append(f"revision {number} kept {kept}, not {past.files}")
        return wrong

    async def settle(self, name: str, *candidates: Expected | None) -> None:
        """Find out which of the candidates came about (None: the container is not there), and believe that one."""
        await self.caller.settled()
        self.proxy.faults.clear()
        engine = await asyncio.to_thread(EngineSide.look, self.rig, self.node)
        holders = {uuid: holder for uuid, holder in (await self.caller.holders()).items() if holder}
        there = await self._there(name)
        found: list[object] = []
        for candidate in candidates:
            if candidate is None or not there:
                wrong = [] if (candidate is None) == (not there) else ["it is there" if there else "it is not there"]
            else:
                wrong = await self._differences(candidate, engine, holders)
            if not wrong:
                if candidate is None:
                    self.known.pop(name, None)
                else:
                    self.known[name] = candidate
                return
            found.append(wrong)
        raise AssertionError(f"{name} is none of what it could be: {found}")

    async def _there(self, name: str) -> bool:
        try:
            await self.caller.get(name)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True

    # -- what is done --------------------------------------------------------------------------------------------------

    async def act(self, name: str, act: Act, *, before: Expected | None, after: Expected | None) -> None:
        """Do something that must succeed, or, where something was harmed, be undone; and be told which."""
        failed = ""
        try:
            await act(self.caller)
        except grpc.aio.AioRpcError as error:
            told = failure_of(error)
            assert told.reason in _HARMED, told
            failed = told.message or "the connection broke"
        harmed = self.harmed
        assert not failed or harmed, f"it failed with nothing harmed: {failed}"
        open_ended = failed and error_leaves_it_open(failed)
        candidates = [after] if not failed else [before, after] if open_ended else [before]
        # A container that was stopped on the way, or could not be started again, is told as it is.
        candidates += [_with_state(one, State.EXITED) for one in candidates if failed and one and one.runs]
        candidates += [_with_state(one, State.STOPPED) for one in candidates if failed and one and one.runs]
        if failed and before and before.state is State.PAUSED:
            # What is frozen is thawed to be stopped.
            candidates.append(_with_state(before, State.RUNNING))
        await self.settle(name, *candidates)

    @property
    def harmed(self) -> bool:
        """Whether a fault lies in wait, or has been met."""
        return bool(self.proxy.faults._faults)

    async def kill_during(self, name: str, act: Act, *, before: Expected | None, after: Expected | None) -> None:
        """`kill -9` at a random moment of it; the next daemon brings it to one of its two ends."""
        # What the caller is told is that the connection broke, or the outcome, where it was quicker.
        going = asyncio.ensure_future(_told(act(self.caller)))
        await asyncio.sleep(random.uniform(0.0, 0.6))  # noqa: S311 - a moment, not a secret
        succeeded = going.done() and going.result()
        await self.restart(kill=True)
        await going
        await self.settle(name, *([after] if succeeded else [before, after]))

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

    # -- behind its back -----------------------------------------------------------------------------------------------

    async def outside(self, name: str, deed: str) -> None:
        """What a person with the docker command does; the daemon notices."""
        one = self.known[name].copy()
        (inspected,) = EngineSide.look(self.rig, self.node).by_name[name]
        where = f"/containers/{inspected['Id']}"
        match deed:
            case "rm":
                self.rig.engine.call("DELETE", where, query={"force": "1"})
                one.state, one.holds, one.cards = State.FAILED, False, 0
            case "stop" | "kill":
                self.rig.engine.call("POST", f"{where}/{deed}")
                one.state = State.EXITED
            case "pause":
                self.rig.engine.call("POST", f"{where}/pause")
                one.state = State.PAUSED
            case "start":
                return await self._started_outside(name, where)
            case "rename":
                self.rig.engine.call("POST", f"{where}/rename", query={"name": f"mine-{name}"})
                await _until(lambda: self._inspected(name)["Name"] == inspected["Name"])
            case "limit":
                self.rig.engine.call("POST", f"{where}/update", send={"NanoCpus": 700_000_000})
                wanted = round(one.spec.cpus * 1e9) or self.rig.engine.call("GET", "/info")["NCPU"] * 1_000_000_000
                await _until(lambda: self._inspected(name)["HostConfig"]["NanoCpus"] == wanted)
        wanted_state = f"CONTAINER_STATE_{one.state}"
        async with asyncio.timeout(_NOTICED_S):
            while container_pb2.ContainerState.Name((await self.caller.get(name)).status.state) != wanted_state:
                await asyncio.sleep(0.02)
        self.known[name] = one
        return None

    def _inspected(self, name: str) -> Any:
        return EngineSide.look(self.rig, self.node).by_name[name][0]

    async def _started_outside(self, name: str, where: str) -> None:
        """What it was given is claimed for it if it is free; else it is stopped again."""
        inspected = self._inspected(name)
        spec = self.known[name].spec
        if len(cards_of(inspected)) != spec.gpus or bool(inspected["HostConfig"]["PortBindings"]) != spec.port:
            return None  # it was changed since it last ran, and what runs then is not what its spec says
        try:
            self.rig.engine.call("POST", f"{where}/start")
        except HttpStatusError:
            return None  # its port is another's by now
        runs, stopped = self.known[name].copy(), self.known[name].copy()
        runs.state, runs.holds, runs.cards = State.RUNNING, True, spec.gpus
        async with asyncio.timeout(_NOTICED_S):
            while True:
                with contextlib.suppress(AssertionError):
                    return await self.settle(name, runs, stopped)
                await asyncio.sleep(0.05)

    async def write(self, name: str, file: str, content: str | None) -> None:
        """Write a file, or (None) delete one."""
        one = self.known[name]
        if file == GROUP:
            script = f"rm -f {GROUP}"
            one.files[GROUP] = "deleted"
        elif content is None:
            script = f"rm -f /work/{file}"
            one.files.pop(file, None)
        else:
            script = f"mkdir -p /work && printf %s '{content}' > /work/{file}"
            one.files[file] = content
        await self.caller.shell(name, script)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(_NOTICED_S):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.05)


async def _told(call: Awaitable[object]) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError:
        return False
    return True


def error_leaves_it_open(message: str) -> bool:
    """Whether what a caller is told says neither that it was done nor that it was not."""
    return "out of reach" in message or "shutting down" in message or "connection" in message.lower()


def _with_state(one: Expected, state: State) -> Expected:
    other = one.copy()
    other.state = state
    return other


def _spec_of(container: container_pb2.Container) -> Spec:
    spec = container.spec
    return Spec(
        gpus=spec.gpus.count,
        port=bool(spec.ports),
        cpus=spec.cpus,
        env=tuple(sorted(spec.env.items())),
        labels=tuple(sorted(spec.labels.items())),
    )


def fields_of(spec: Spec) -> dict[str, Any]:
    """A spec as the contract's fields."""
    return {
        "ports": [_PORT] if spec.port else [],
        "cpus": spec.cpus,
        "env": dict(spec.env),
        "labels": dict(spec.labels),
    }


def snapshots(keep: bool) -> dict[str, Any]:  # noqa: FBT001 - drawn
    """The word for whether files are kept, as a call has it."""
    return {} if keep else {"snapshots": _NEVER}


def pruned(one: Expected, keep: int) -> Expected:
    """With no more than `keep` revisions, the current one among them."""
    after = one.copy()
    for number in sorted(after.past)[: max(0, len(after.past) - keep + 1)]:
        del after.past[number]
    return after


def restorable(one: Expected) -> Sequence[tuple[int, Past]]:
    """The revisions that can be returned to with their files."""
    return [(number, past) for number, past in sorted(one.past.items()) if past.files is not None]
