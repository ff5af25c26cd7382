"""The rules of containers: every request that changes one, half the time with a disturbance."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any

from gpudock.v1 import container_service_pb2
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.calls import Caller, clone_request, result_of, scale_request, update_request
from tests.stateful.model import GROUP, ExpectedContainer, PastRevision, Spec
from tests.stateful.requests import (
    fields_of,
    mounts_of,
    new_container,
    prune_revisions,
    restorable_revisions,
    snapshot_fields,
)
from tests.stateful.rule_base import (
    EXITED,
    FAILED,
    GPUS,
    KEEP,
    NAMES,
    PAUSED,
    RESTING,
    RUNNING,
    STOPPED,
    RuleBase,
    counted,
)
from tests.stateful.sequence_shrinker import Draws

_FILES = ("a", "b", "c", GROUP)
_CONTENTS = st.sampled_from(("one", "two", "three", "", None))


def _number(choice: tuple[int, PastRevision]) -> int:
    return choice[0]


class ContainerRules(RuleBase):
    """See the module's docstring."""

    @precondition(lambda self: len(self.host.containers) < len(NAMES))
    @rule(data=st.data(), gpus=GPUS, port=st.booleans(), create_only=st.booleans())
    @counted
    def create(self, data: Draws, gpus: int, port: bool, create_only: bool) -> None:
        """Create a container, if there are a name and GPUs for it."""
        if not self.can_claim(gpus):
            return self.skip()
        name = self.free_name(data)
        after = new_container(name, Spec(gpus=gpus, port=port, mounts=self.choose_mounts(data)))
        if create_only:
            after.state = STOPPED
        request = container_service_pb2.CreateContainerRequest(
            name=name,
            spec=Caller.spec(gpus, **fields_of(after.spec)),
            create_only=create_only,
            request_id=str(uuid.uuid4()),
        )
        self.perform(data, name, lambda caller: result_of(caller.containers.CreateContainer(request)), None, after)
        return self._record_uid(name)

    def _record_uid(self, name: str) -> None:
        if name in self.host.containers:
            self.loop.run(self._learn_uid(name))

    async def _learn_uid(self, name: str) -> None:
        self.host.containers[name].uid = (await self.host.caller.get(name)).uid

    @precondition(lambda self: self.has_container(RUNNING))
    @rule(data=st.data(), file=st.sampled_from(_FILES), content=_CONTENTS)
    @counted
    def write(self, data: Draws, file: str, content: str | None) -> None:
        """Write or delete a file of a running container."""
        self.loop.run(self.host.write(self.choose_container(data, RUNNING).name, file, content))
        self.tally["write"] += 1

    @precondition(lambda self: self.has_container(RUNNING))
    @rule(data=st.data(), file=st.sampled_from(_FILES), content=_CONTENTS)
    @counted
    def write_more(self, data: Draws, file: str, content: str | None) -> None:
        """Write twice as often as other rules: most changes of a container are its own."""
        self.write(data, file, content)

    @precondition(lambda self: self.has_container(RUNNING))
    @rule(data=st.data(), gpus=GPUS, keep=st.booleans())
    @counted
    def scale(self, data: Draws, gpus: int, keep: bool) -> None:
        """Change the number of GPUs, by a successor."""
        container = self.choose_container(data, RUNNING)
        if gpus == container.spec.gpus or not self.can_claim(gpus, released=container.spec.gpus):
            return self.skip()
        request = scale_request(container.name, gpus, **snapshot_fields(keep))
        after = prune_revisions(container.changed(replace(container.spec, gpus=gpus), kept=keep), KEEP)
        return self._scale(data, container, request, after)

    @precondition(lambda self: self.has_container(*RESTING))
    @rule(data=st.data(), cpus=st.sampled_from((0.5, 1.0, 1.5)), keep=st.booleans())
    @counted
    def limit_cpus(self, data: Draws, cpus: float, keep: bool) -> None:
        """Change the CPU limit in place, also of a stopped container."""
        container = self.choose_container(data, RUNNING, STOPPED, EXITED)
        if cpus == container.spec.cpus:
            return self.skip()
        request = scale_request(container.name, cpus=cpus, **snapshot_fields(keep))
        after = prune_revisions(container.changed(replace(container.spec, cpus=cpus), kept=keep), KEEP)
        return self._scale(data, container, request, after)

    def _scale(self, data: Draws, container: ExpectedContainer, request: Any, after: ExpectedContainer) -> None:
        self.perform(
            data, container.name, lambda caller: result_of(caller.containers.ScaleContainer(request)), container, after
        )

    @precondition(lambda self: self.has_container(*RESTING))
    @rule(data=st.data(), field=st.sampled_from(("env", "labels")), value=st.sampled_from(("x", "y")))
    @counted
    def update(self, data: Draws, field: str, value: str) -> None:
        """Change the environment, by a successor, or labels, in place."""
        other: Any = {field: (("k", value),)}
        fields: Any = {field: {"k": value}}
        container = self.choose_container(data, RUNNING, STOPPED, EXITED)
        if getattr(container.spec, field) == (("k", value),):
            return self.skip()
        return self._update(data, container, replace(container.spec, **other), update_request(container.name, **fields))

    @precondition(lambda self: self.has_volumes and self.has_container(*RESTING))
    @rule(data=st.data())
    @counted
    def mount(self, data: Draws) -> None:
        """Change the mounts."""
        container = self.choose_container(data, *RESTING)
        spec = replace(container.spec, mounts=self.choose_mounts(data))
        if spec == container.spec:
            return self.skip()
        return self._update(data, container, spec, update_request(container.name, "mounts", mounts=mounts_of(spec)))

    def _update(self, data: Draws, container: ExpectedContainer, spec: Spec, request: Any) -> None:
        after = prune_revisions(container.changed(spec), KEEP)
        self.perform(
            data, container.name, lambda caller: result_of(caller.containers.UpdateContainer(request)), container, after
        )

    @precondition(lambda self: self.has_container(*RESTING, FAILED))
    @rule(data=st.data(), spec_only=st.booleans())
    @counted
    def rollback(self, data: Draws, spec_only: bool) -> None:
        """Roll back to an earlier revision."""
        states = RESTING if spec_only else (*RESTING, FAILED)
        if not self.has_container(*states):
            return self.skip()
        container = self.choose_container(data, *states)
        # A rollback to the same spec would change nothing.
        others = [(number, past) for number, past in container.past.items() if past.spec != container.spec]
        choices = others if spec_only else list(restorable_revisions(container))
        if not choices:
            return self.skip()
        number, past = data.choose(choices, "revision", _number)
        if container.state is RUNNING and not self.can_claim(past.spec.gpus, released=container.spec.gpus):
            return self.skip()
        request = container_service_pb2.RollbackContainerRequest(
            name=container.name, revision=number, spec_only=spec_only
        )

        async def act(caller: Caller) -> None:
            await result_of(caller.containers.RollbackContainer(request))

        if self.lacks_volume(past.spec):
            # The volume was deleted, and there is no other one of its name.
            return self.refused(act, "VOLUME_NOT_FOUND", container.name)
        after = container.changed(past.spec, files=None if spec_only else dict(past.files or ()))
        if container.state is FAILED:
            # The successor is created and not started.
            after.state = STOPPED
        return self.perform(data, container.name, act, container, prune_revisions(after, KEEP))

    @precondition(lambda self: self.has_container(RUNNING, PAUSED))
    @rule(data=st.data(), keep_resources=st.booleans())
    @counted
    def stop(self, data: Draws, keep_resources: bool) -> None:
        """Stop a container."""
        container = self.choose_container(data, RUNNING, PAUSED)
        after = container.copy()
        after.state = STOPPED
        if not keep_resources:
            after.holds, after.gpus = False, 0
        name = container.name
        self.perform(data, name, lambda caller: caller.stop(name, keep_resources=keep_resources), container, after)

    @precondition(lambda self: self.has_container(STOPPED, EXITED))
    @rule(data=st.data())
    @counted
    def start(self, data: Draws) -> None:
        """Start a container; if its GPUs must change, that is a successor and a new revision."""
        container = self.choose_container(data, STOPPED, EXITED)
        if not self.can_claim(container.spec.gpus, released=container.gpus):
            return self.skip()
        self.loop.run(self._start(container.name))
        return self.loop.run(self.host.check(container.name))

    async def _start(self, name: str) -> None:
        container = self.host.containers[name]
        now = await self.host.caller.start(name)
        replaced = now.revision != container.revision
        after = prune_revisions(container.changed(container.spec), KEEP) if replaced else container.copy()
        after.state, after.holds, after.gpus = RUNNING, True, after.spec.gpus
        await self.host.settle(name, after)

    @precondition(lambda self: self.has_container(RUNNING))
    @rule(data=st.data())
    @counted
    def restart(self, data: Draws) -> None:
        """Restart a container; only its process changes."""
        container = self.choose_container(data, RUNNING)
        name = container.name
        self.perform(data, name, lambda caller: caller.restart(name), container, container.copy())

    @precondition(lambda self: self.has_container(RUNNING, PAUSED))
    @rule(data=st.data())
    @counted
    def pause_or_unpause(self, data: Draws) -> None:
        """Pause a running container, or unpause a paused one."""
        container = self.choose_container(data, RUNNING, PAUSED)
        after, name = container.copy(), container.name
        after.state = PAUSED if container.state is RUNNING else RUNNING
        if container.state is RUNNING:
            request = container_service_pb2.PauseContainerRequest(name=name)
            self.perform(data, name, lambda caller: caller.containers.PauseContainer(request), container, after)
        else:
            thaw = container_service_pb2.UnpauseContainerRequest(name=name)
            self.perform(data, name, lambda caller: caller.containers.UnpauseContainer(thaw), container, after)

    @precondition(lambda self: self.has_container())
    @rule(data=st.data())
    @counted
    def delete_revision(self, data: Draws) -> None:
        """Delete a revision; other revisions keep the files that they share with it."""
        container = self.choose_container(data)
        if not container.past:
            return self.skip()
        number = data.choose(sorted(container.past), "revision")
        after, name = container.copy(), container.name
        del after.past[number]
        return self.perform(data, name, lambda caller: caller.delete_revision(name, number), container, after)

    @precondition(lambda self: self.has_container())
    @rule(data=st.data())
    @counted
    def delete(self, data: Draws) -> None:
        """Delete a container; without `force` a running one must be refused."""
        container = self.choose_container(data)
        name = container.name
        match data.choose(("skip", "without force", "with force"), "how"):
            case "skip":
                return self.skip()
            case "without force" if container.runs:
                return self.refused(lambda caller: caller.delete(name, force=False), "CONTAINER_RUNNING", name)
            case how:
                self.loop.run(self.host.caller.delete(name, force=how == "with force"))
                del self.host.containers[name]
                return self.loop.run(self.host.check())

    @precondition(lambda self: self.has_container(RUNNING) and len(self.host.containers) < len(NAMES))
    @rule(data=st.data())
    @counted
    def clone(self, data: Draws) -> None:
        """Clone a container with its current files or those of a revision."""
        container = self.choose_container(data, RUNNING)
        name = self.free_name(data)
        choices = [(0, PastRevision(container.spec, tuple(container.files.items()))), *restorable_revisions(container)]
        number, past = data.choose(choices, "revision", _number)
        if not self.can_claim(past.spec.gpus):
            return self.skip()
        request = clone_request(container.name, name, revision=number)

        async def act(caller: Caller) -> None:
            await result_of(caller.containers.CloneContainer(request))

        if self.lacks_volume(past.spec):
            return self.refused(act, "VOLUME_NOT_FOUND", container.name)
        after = new_container(name, past.spec)
        after.files = dict(past.files or ())
        self.perform(data, name, act, None, after)
        self._record_uid(name)
        return self.loop.run(self.host.check(container.name))

    @precondition(lambda self: self.has_container(*RESTING))
    @rule(data=st.data())
    @counted
    def commit(self, data: Draws) -> None:
        """Commit the files to an image; the container is unchanged."""
        container = self.choose_container(data, *RESTING)
        # An image name belongs to one node and store, so that an image of an earlier daemon must not have it.
        repository = f"stateful/{self.host.node}"
        self.perform(
            data,
            container.name,
            lambda caller: caller.commit(container.name, repository, tag=container.name),
            container,
            container.copy(),
        )

    @precondition(lambda self: self.has_container(RUNNING))
    @rule(data=st.data())
    @counted
    def two_updates_at_once(self, data: Draws) -> None:
        """Make two updates at once; each succeeds, or is refused because of the other."""
        container = self.choose_container(data, RUNNING)
        self.loop.run(self._two_updates_at_once(container))
        self.loop.run(self.host.check(container.name))

    async def _two_updates_at_once(self, container: ExpectedContainer) -> None:
        values = [value for value in ("x", "y", "z") if container.spec.env != (("k", value),)][:2]
        requests = [update_request(container.name, env={"k": value}) for value in values]
        calls = [result_of(self.host.caller.containers.UpdateContainer(request)) for request in requests]
        done = await asyncio.gather(*calls, return_exceptions=True)
        specs = [replace(container.spec, env=(("k", value),)) for value in values]
        first, second = (container.changed(spec) for spec in specs)
        both = [first.changed(specs[1]), second.changed(specs[0])]
        succeeded = [not isinstance(outcome, BaseException) for outcome in done]
        assert any(succeeded), done
        candidates = both if all(succeeded) else [first if succeeded[0] else second]
        await self.host.settle(container.name, *(prune_revisions(candidate, KEEP) for candidate in candidates))
