"""Random sequences of requests, faults, kills and outside commands: whatever happens, the model holds.

`--steps N` says how many steps are taken in all; a failure shows every step of the sequence that led to it.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from gpudock.v1 import container_pb2, container_service_pb2
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.calls import Caller, clone_request, result_of, scale_request, update_request
from tests.conftest import FAST, own_state
from tests.rig import EngineProxy, Fault, Rig
from tests.stateful.arena import Act, Arena, fields_of, pruned, restorable, snapshots
from tests.stateful.hanging import standing
from tests.stateful.model import GROUP, Expected, Past, Spec, State

T = TypeVar("T")

RUNNING, PAUSED, EXITED, STOPPED, FAILED = State
_RESTING = (RUNNING, STOPPED, EXITED)
# Of these troubles each must have been met, and so often; else the sequences were too tame to show anything.
_TROUBLES = ("refuse", "drop", "drop after", "kill")

# One sequence; each has a daemon and a state of its own.
_SEQUENCE = 50
_PARTS = 4
# From so many steps on, all of it is met.
_TELLING_STEPS = 1000
_KEEP = 6
_NAMES = ("ada", "bob", "cleo")
_FILES = ("a", "b", "c", GROUP)
_GPUS = st.integers(0, 3)
_CONTENTS = st.sampled_from(("one", "two", "three", "", None))
_CALLS = r"/(containers|images)(/(?!.*/wait$).*)?"
_DEEDS = "POST|DELETE"


class Loop:
    """An event loop in a thread of its own, for rules that hypothesis calls without one."""

    def __init__(self, hangs_s: float = 120.0) -> None:
        """Nothing that is run takes longer than `hangs_s` unless it hangs."""
        self._hangs_s = hangs_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.standing: Callable[[asyncio.AbstractEventLoop], str] = repr
        """Says where everything stands, should something not return."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self._hangs_s)
        except TimeoutError:
            if future.done():
                raise
            pytest.fail(f"it has not returned within {self._hangs_s:g} s\n{self.standing(self._loop)}")

    def close(self) -> None:
        """End the thread, and what it has not brought to its end."""
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(self._hangs_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1)


class Host(RuleBasedStateMachine):
    """A host with one daemon, to which things happen."""

    rig: Rig
    loop: Loop
    tally: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self._arena: Arena | None = None
        self._proxy: EngineProxy | None = None

    @initialize()
    def begin(self) -> None:
        """A daemon with nothing in it."""
        self._proxy = self.rig.engine_proxy()
        self.loop.run(self._proxy.__aenter__())
        self._arena = self.loop.run(Arena.open(self.rig, self._proxy))
        self.loop.standing = lambda loop: standing(loop, self.arena.daemon, self.rig)

    def teardown(self) -> None:
        """Whatever it was, all of it can be deleted."""
        try:
            if self._arena is not None:
                self.loop.run(self._arena.close())
        finally:
            if self._proxy is not None:
                self.loop.run(self._proxy.__aexit__(None, None, None))
            self.rig.engine.remove_all()

    @property
    def arena(self) -> Arena:
        """The one that was begun."""
        assert self._arena is not None
        return self._arena

    # -- drawing -------------------------------------------------------------------------------------------------------

    def has(self, *states: State) -> bool:
        """Whether there is one in any of these states (none: in any at all)."""
        known = self._arena.known if self._arena else {}
        return any(not states or one.state in states for one in known.values())

    def _one(self, data: st.DataObject, *states: State) -> Expected:
        names = sorted(name for name, one in self.arena.known.items() if not states or one.state in states)
        return self.arena.known[data.draw(st.sampled_from(names), label="which")]

    def _do(self, data: st.DataObject, name: str, act: Act, before: Expected | None, after: Expected | None) -> None:
        """Undisturbed half the time; else the engine is harmed meanwhile, or the daemon killed."""
        trouble = data.draw(st.sampled_from(("none",) * 4 + _TROUBLES), label="trouble")
        if trouble == "kill":
            self.loop.run(self.arena.kill_during(name, act, before=before, after=after))
            self.tally[trouble] += 1
        else:
            fault = self._plant(data, trouble)
            self.loop.run(self.arena.act(name, act, before=before, after=after))
            self.tally[trouble] += fault is None or fault.hit.is_set()
        self.loop.run(self.arena.check(name))

    def _plant(self, data: st.DataObject, trouble: str) -> Fault | None:
        faults = self.arena.proxy.faults
        match trouble:
            case "refuse":
                # Questions are refused too; there are many of them between two deeds.
                if data.draw(st.booleans(), label="a deed"):
                    return faults.fail(_DEEDS, _CALLS, nth=data.draw(st.integers(1, 5), label="nth"))
                return faults.fail(".*", _CALLS, nth=data.draw(st.integers(1, 15), label="nth"))
            case "drop" | "drop after":
                nth = data.draw(st.integers(1, 5), label="nth")
                return faults.drop(_DEEDS, _CALLS, nth=nth, after=trouble == "drop after")
        return None

    # -- requests ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(name not in self.arena.known for name in _NAMES))
    @rule(data=st.data(), gpus=_GPUS, port=st.booleans())
    def create(self, data: st.DataObject, gpus: int, port: bool) -> None:  # noqa: FBT001 - drawn
        """A container more, if there are names and cards for it."""
        free = [name for name in _NAMES if name not in self.arena.known]
        if gpus > 8 - self._held():
            return
        name = data.draw(st.sampled_from(free), label="name")
        spec = Spec(gpus=gpus, port=port)
        request = container_service_pb2.CreateContainerRequest(name=name, spec=Caller.spec(gpus, **fields_of(spec)))
        request.request_id = str(uuid.uuid4())
        made: list[container_pb2.Container] = []

        async def act(caller: Caller) -> None:
            made.append(await result_of(caller.containers.CreateContainer(request)))

        after = _Unborn(name, spec)
        self._do(data, name, act, None, after)
        if name in self.arena.known:
            self.loop.run(self._learn_uid(name))

    def _held(self) -> int:
        return sum(one.cards for one in self.arena.known.values())

    async def _learn_uid(self, name: str) -> None:
        self.arena.known[name].uid = (await self.arena.caller.get(name)).uid

    @precondition(lambda self: self.has(RUNNING))
    @rule(data=st.data(), file=st.sampled_from(_FILES), content=_CONTENTS)
    def write(self, data: st.DataObject, file: str, content: str | None) -> None:
        """Files change in what runs."""
        self.loop.run(self.arena.write(self._one(data, RUNNING).name, file, content))
        self.tally["write"] += 1

    @precondition(lambda self: self.has(RUNNING))
    @rule(data=st.data(), file=st.sampled_from(_FILES), content=_CONTENTS)
    def write_more(self, data: st.DataObject, file: str, content: str | None) -> None:
        """Most of what happens to a container are its own doings."""
        self.write(data, file, content)

    @precondition(lambda self: self.has(RUNNING))
    @rule(data=st.data(), gpus=_GPUS, keep=st.booleans())
    def scale(self, data: st.DataObject, gpus: int, keep: bool) -> None:  # noqa: FBT001 - drawn
        """Other cards, by a successor."""
        one = self._one(data, RUNNING)
        if gpus == one.spec.gpus or gpus - one.spec.gpus > 8 - self._held():
            return
        request = scale_request(one.name, gpus, **snapshots(keep))
        after = pruned(one.changed(replace(one.spec, gpus=gpus), kept=keep), _KEEP)
        self._do(data, one.name, lambda caller: result_of(caller.containers.ScaleContainer(request)), one, after)

    @precondition(lambda self: self.has(*_RESTING))
    @rule(data=st.data(), cpus=st.sampled_from((0.5, 1.0, 1.5)), keep=st.booleans())
    def limit(self, data: st.DataObject, cpus: float, keep: bool) -> None:  # noqa: FBT001 - drawn
        """Another limit, in place, also of what does not run."""
        one = self._one(data, RUNNING, STOPPED, EXITED)
        if cpus == one.spec.cpus:
            return
        request = scale_request(one.name, cpus=cpus, **snapshots(keep))
        after = pruned(one.changed(replace(one.spec, cpus=cpus), kept=keep), _KEEP)
        self._do(data, one.name, lambda caller: result_of(caller.containers.ScaleContainer(request)), one, after)

    @precondition(lambda self: self.has(*_RESTING))
    @rule(data=st.data(), field=st.sampled_from(("env", "labels")), value=st.sampled_from(("x", "y")))
    def update(self, data: st.DataObject, field: str, value: str) -> None:
        """Environment by a successor, labels in place."""
        other: Any = {field: (("k", value),)}
        fields: Any = {field: {"k": value}}
        one = self._one(data, RUNNING, STOPPED, EXITED)
        if getattr(one.spec, field) == (("k", value),):
            return
        request = update_request(one.name, **fields)
        after = pruned(one.changed(replace(one.spec, **other)), _KEEP)
        if one.state is EXITED and field == "env":
            after.state = STOPPED  # a successor that was never started
        self._do(data, one.name, lambda caller: result_of(caller.containers.UpdateContainer(request)), one, after)

    @precondition(lambda self: self.has(*_RESTING, FAILED))
    @rule(data=st.data(), spec_only=st.booleans())
    def rollback(self, data: st.DataObject, spec_only: bool) -> None:  # noqa: FBT001 - drawn
        """To any revision that can be returned to."""
        one = self._one(data, RUNNING, STOPPED, EXITED, FAILED)
        if spec_only and one.state is FAILED:
            return
        choices = list(one.past.items()) if spec_only else list(restorable(one))
        if not choices:
            return
        number, past = data.draw(st.sampled_from(choices), label="revision")
        runs = one.state is RUNNING
        if spec_only and past.spec == one.spec:
            return  # nothing would change
        if runs and past.spec.gpus - one.spec.gpus > 8 - self._held():
            return
        request = container_service_pb2.RollbackContainerRequest(name=one.name, revision=number, spec_only=spec_only)
        files = None if spec_only else dict(past.files or ())
        after = one.changed(past.spec, files=files)
        if one.state is FAILED or (one.state is EXITED and (not spec_only or past.spec.env != one.spec.env)):
            # A successor that was never started.
            after.state = STOPPED
        self._do(
            data,
            one.name,
            lambda caller: result_of(caller.containers.RollbackContainer(request)),
            one,
            pruned(after, _KEEP),
        )

    @precondition(lambda self: self.has(RUNNING, PAUSED))
    @rule(data=st.data(), keep_resources=st.booleans())
    def stop(self, data: st.DataObject, keep_resources: bool) -> None:  # noqa: FBT001 - drawn
        """Stop what runs."""
        one = self._one(data, RUNNING, PAUSED)
        after = one.copy()
        after.state = STOPPED
        if not keep_resources:
            after.holds, after.cards = False, 0
        name = one.name
        self._do(data, name, lambda caller: caller.stop(name, keep_resources=keep_resources), one, after)

    @precondition(lambda self: self.has(STOPPED, EXITED))
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """Start what does not run; where it was given other cards meanwhile it gets a successor, and a revision."""
        one = self._one(data, STOPPED, EXITED)
        if one.spec.gpus - one.cards > 8 - self._held():
            return
        name = one.name
        self.loop.run(self._start(name))
        self.loop.run(self.arena.check(name))

    async def _start(self, name: str) -> None:
        one = self.arena.known[name]
        now = await self.arena.caller.start(name)
        after = one.copy() if now.revision == one.revision else pruned(one.changed(one.spec), _KEEP)
        after.state, after.holds, after.cards = RUNNING, True, after.spec.gpus
        await self.arena.settle(name, after)

    @precondition(lambda self: self.has(RUNNING))
    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        """Another process, the same everything."""
        one = self._one(data, RUNNING)
        name = one.name
        self._do(data, name, lambda caller: caller.restart(name), one, one.copy())

    @precondition(lambda self: self.has(RUNNING, PAUSED))
    @rule(data=st.data())
    def pause_or_thaw(self, data: st.DataObject) -> None:
        """Freeze what runs, thaw what is frozen."""
        one = self._one(data, RUNNING, PAUSED)
        after, name = one.copy(), one.name
        after.state = PAUSED if one.state is RUNNING else RUNNING
        if one.state is RUNNING:
            request = container_service_pb2.PauseContainerRequest(name=name)
            self._do(data, name, lambda caller: caller.containers.PauseContainer(request), one, after)
        else:
            thaw = container_service_pb2.UnpauseContainerRequest(name=name)
            self._do(data, name, lambda caller: caller.containers.UnpauseContainer(thaw), one, after)

    @precondition(lambda self: self.has())
    @rule(data=st.data())
    def delete_revision(self, data: st.DataObject) -> None:
        """Others keep the files that they share with it."""
        one = self._one(data)
        if not one.past:
            return
        number = data.draw(st.sampled_from(sorted(one.past)), label="revision")
        after, name = one.copy(), one.name
        del after.past[number]
        self._do(data, name, lambda caller: caller.delete_revision(name, number), one, after)

    @precondition(lambda self: self.has())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """With all that belongs to it."""
        one = self._one(data)
        if not data.draw(st.booleans(), label="really"):
            return
        name = one.name
        self.loop.run(self.arena.caller.delete(name))
        del self.arena.known[name]
        self.loop.run(self.arena.check())

    @precondition(lambda self: self.has(RUNNING))
    @rule(data=st.data())
    def two_at_once(self, data: st.DataObject) -> None:
        """Of two changes at once each is done, or refused because of the other."""
        one = self._one(data, RUNNING)
        self.loop.run(self._two_at_once(one))
        self.loop.run(self.arena.check(one.name))

    async def _two_at_once(self, one: Expected) -> None:
        values = [value for value in ("x", "y", "z") if one.spec.env != (("k", value),)][:2]
        requests = [update_request(one.name, env={"k": value}) for value in values]
        calls = [result_of(self.arena.caller.containers.UpdateContainer(request)) for request in requests]
        done = await asyncio.gather(*calls, return_exceptions=True)
        specs = [replace(one.spec, env=(("k", value),)) for value in values]
        first, second = (one.changed(spec) for spec in specs)
        both = [first.changed(specs[1]), second.changed(specs[0])]
        succeeded = [not isinstance(outcome, BaseException) for outcome in done]
        assert any(succeeded), done
        candidates = both if all(succeeded) else [first if succeeded[0] else second]
        await self.arena.settle(one.name, *(pruned(candidate, _KEEP) for candidate in candidates))

    # -- what else happens ---------------------------------------------------------------------------------------------

    @precondition(lambda self: bool(self.arena.known))
    @rule(kill=st.booleans())
    def another_daemon(self, kill: bool) -> None:  # noqa: FBT001 - drawn
        """Killed or stopped, with nothing under way."""
        self.loop.run(self.arena.restart(kill=kill))
        self.loop.run(self.arena.check())

    @precondition(lambda self: self.has(RUNNING) and len(self.arena.known) < len(_NAMES))
    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        """Another one with the files of now, or of a revision."""
        one = self._one(data, RUNNING)
        name = data.draw(st.sampled_from([name for name in _NAMES if name not in self.arena.known]), label="name")
        number, past = data.draw(
            st.sampled_from([(0, Past(one.spec, tuple(one.files.items()))), *restorable(one)]), label="revision"
        )
        if past.spec.gpus > 8 - self._held():
            return
        request = clone_request(one.name, name, revision=number)
        after = _Unborn(name, past.spec)
        after.files = dict(past.files or ())
        self._do(data, name, lambda caller: result_of(caller.containers.CloneContainer(request)), None, after)
        if name in self.arena.known:
            self.loop.run(self._learn_uid(name))
        self.loop.run(self.arena.check(one.name))

    @precondition(lambda self: self.has(*_RESTING))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """An image of its files; the container is as it was."""
        one = self._one(data, *_RESTING)
        self._do(data, one.name, lambda caller: caller.commit(one.name, "stateful/image"), one, one.copy())

    @precondition(lambda self: self.has(*_RESTING))
    @rule(data=st.data(), deed=st.sampled_from(("rm", "stop", "kill", "pause", "start", "rename", "limit")))
    def behind_its_back(self, data: st.DataObject, deed: str) -> None:
        """The docker command does something to one of its containers."""
        states = {"rm": (RUNNING, EXITED), "start": (EXITED, STOPPED), "rename": _RESTING}.get(deed, (RUNNING,))
        if not self.has(*states):
            return
        one = self._one(data, *states)
        # Not often: what is removed is lost for the rest of the sequence, unless it is rolled back.
        if deed == "rm" and not data.draw(st.booleans(), label="really"):
            return
        self.loop.run(self.arena.outside(one.name, deed))
        self.loop.run(self.arena.check(one.name))
        self.tally[f"docker {deed}"] += 1

    @rule()
    def look_at_everything(self) -> None:
        """Everything agrees."""
        self.loop.run(self.arena.check())


def _Unborn(name: str, spec: Spec) -> Expected:  # noqa: N802 - made like a record
    """A container whose uid the server has yet to choose."""
    return Expected(name=name, uid="", state=RUNNING, spec=spec, cards=spec.gpus)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(_PARTS))
def test_the_model_holds(rig: Rig, request: pytest.FixtureRequest, part: int) -> None:
    steps = int(request.config.getoption("--steps"))
    loop = Loop()
    tally: Counter[str] = Counter()
    kind = type(f"Host{part}", (Host,), {"rig": rig, "loop": loop, "tally": tally})
    try:
        run_state_machine_as_test(
            kind,
            settings=settings(
                max_examples=max(1, -(-steps // _PARTS // _SEQUENCE)),
                stateful_step_count=_SEQUENCE,
                # A failing sequence is shown as it was: played again it would go otherwise.
                phases=[Phase.generate],
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                verbosity=Verbosity.normal,
            ),
        )
    finally:
        loop.close()
        print(f"\nmet: {dict(sorted(tally.items()))}")  # noqa: T201 - shown where it fails, and with -s
    if steps >= _TELLING_STEPS:
        assert all(tally[trouble] for trouble in _TROUBLES), tally


def test_what_hangs_is_shown(rig: Rig) -> None:
    loop = Loop(hangs_s=0.2)
    daemon = rig.daemon(*FAST, *own_state())
    loop.standing = lambda running: standing(running, daemon, rig)
    try:
        with pytest.raises(pytest.fail.Exception) as failure:
            loop.run(_never())
    finally:
        loop.close()
        daemon.stop()
    shown = str(failure.value)
    for part in ("in _never", "that is every task", "goroutine 1 ", rig.id, " dockerd S "):
        assert part in shown


async def _never() -> None:
    await asyncio.Event().wait()
