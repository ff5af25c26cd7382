"""The rules of volumes: what changes them, what they refuse, and what is written in them."""

from __future__ import annotations

import uuid
from pathlib import Path

from gpudock.v1 import volume_service_pb2
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.calls import Caller, progress_of
from tests.stateful.docker_commands import foreign_container
from tests.stateful.model import ExpectedContainer, ExpectedVolume, containers_mounting
from tests.stateful.requests import pruned
from tests.stateful.rule_base import EXITED, KEEP, PAUSED, RUNNING, STOPPED, VOLUMES, RuleBase, counted
from tests.stateful.sequence_shrinker import Draws

_MIB = 1 << 20
_FILES = st.sampled_from(("a", "b"))
_CONTENTS = st.sampled_from(("red", "green", "", None))
# In these steps; XFS takes no less than 236 MiB.
_SMALLEST_MIB = 240
_STEP_MIB = 16
_SIZES = st.sampled_from((0, _SMALLEST_MIB))


class VolumeRules(RuleBase):
    """See the module's docstring."""

    def _volume(self, data: Draws) -> ExpectedVolume:
        return self.host.volumes[data.choose(sorted(self.host.volumes), "volume")]

    def _users(self, volume: str) -> list[ExpectedContainer]:
        return [self.host.known[name] for name in containers_mounting(self.host.known.values(), volume)]

    def _free_volume(self, data: Draws) -> str:
        free = [name for name in VOLUMES if name not in self.host.volumes]
        return data.choose(free, "volume")

    @precondition(lambda self: len(self.host.volumes) < len(VOLUMES))
    @rule(data=st.data(), size_mib=_SIZES)
    @counted
    def create_volume(self, data: Draws, size_mib: int) -> None:
        """With a size or without."""
        name = self._free_volume(data)
        request = volume_service_pb2.CreateVolumeRequest(
            name=name, size_bytes=size_mib * _MIB, request_id=str(uuid.uuid4())
        )
        after = ExpectedVolume(name, (size_mib,))
        self.perform(data, name, lambda caller: caller.volumes.CreateVolume(request), None, after)

    @precondition(lambda self: len(self.host.volumes) < len(VOLUMES))
    @rule(data=st.data(), size_mib=_SIZES)
    @counted
    def adopt_volume(self, data: Draws, size_mib: int) -> None:
        """What somebody made in the engine: as it is, or copied into one with a size."""
        name, theirs, engine = self._free_volume(data), f"theirs-{uuid.uuid4()}", self.host.rig.engine
        made = engine.call("POST", "/volumes/create", send={"Name": theirs, "Labels": {"gpudock.adopt": "true"}})
        Path(made["Mountpoint"], "theirs").write_text(name)
        request = volume_service_pb2.AdoptVolumeRequest(name=name, engine_volume=theirs, size_bytes=size_mib * _MIB)
        after = ExpectedVolume(name, (size_mib,), {"theirs": name}, adopted="" if size_mib else theirs)
        self.perform(data, name, lambda caller: progress_of(caller.volumes.AdoptVolume(request)), None, after)
        if size_mib or name not in self.host.volumes:
            # It is theirs as before.
            assert Path(made["Mountpoint"], "theirs").read_text() == name
            engine.call("DELETE", f"/volumes/{theirs}")

    @precondition(lambda self: any(self.host.known[name].spec.mounts for name in self._names(RUNNING)))
    @rule(data=st.data(), file=_FILES, content=_CONTENTS)
    @counted
    def write_in_volume(self, data: Draws, file: str, content: str | None) -> None:
        """By one of those that mount it; all others see it, too."""
        places = [(name, path) for name in self._names(RUNNING) for path, _ in self.host.known[name].spec.mounts]
        name, target = data.choose(places, "where")
        self.loop.run(self.host.write_in_volume(name, target, file, content))
        self.tally["write in volume"] += 1

    @precondition(lambda self: any(volume.size_mib for volume in self.host.volumes.values()))
    @rule(data=st.data(), shrink=st.sampled_from((False,) * 4 + (True,)))
    @counted
    def resize_volume(self, data: Draws, shrink: bool) -> None:
        """Grown in place under who uses it; made smaller by a copy, for which those are stopped and started."""
        volume = self._volume(data)
        name, users = volume.name, self._users(volume.name)
        size_mib = (volume.size_mib or _SMALLEST_MIB) + (-_STEP_MIB if shrink else _STEP_MIB)
        request = volume_service_pb2.ResizeVolumeRequest(name=name, size_bytes=size_mib * _MIB)

        async def act(caller: Caller) -> None:
            await progress_of(caller.volumes.ResizeVolume(request))

        if not volume.size_mib:
            self.refused(act, "SIZE_NOT_SUPPORTED", name)
        elif size_mib < _SMALLEST_MIB:
            self.refused(act, "VOLUME_TOO_SMALL_FOR_DATA", name)
        elif shrink and any(container.state is PAUSED for container in users):
            self.refused(act, "CONTAINER_PAUSED", name)
        elif not shrink:
            self.perform(data, name, act, volume, volume.resized(size_mib))
        else:
            self.perform(
                data,
                name,
                act,
                volume,
                volume.resized(size_mib),
                also={container.name: container.copy() for container in users},
            )

    @precondition(lambda self: self.has_volumes)
    @rule(data=st.data(), force=st.booleans(), theirs=st.sampled_from((False,) * 4 + (True,)))
    @counted
    def delete_volume(self, data: Draws, force: bool, theirs: bool) -> None:
        """Not while anything mounts it, and by force not while what mounts it runs; what does not is updated first."""
        volume = self._volume(data)
        name, users = volume.name, self._users(volume.name)
        keep_it = [container.name for container in users if not force or container.state not in (STOPPED, EXITED)]

        async def act(caller: Caller) -> None:
            await caller.delete_volume(name, force=force)

        if theirs:
            # Nor while somebody's own container refers to it.
            with foreign_container(self.host.rig, self.loop.run(self._engine_volume(name))) as other:
                return self.refused(act, "VOLUME_IN_USE", name, *keep_it, holders=keep_it or [other])
        if keep_it:
            return self.refused(act, "VOLUME_IN_USE", name, *keep_it, holders=keep_it)
        also = {container.name: pruned(container.changed(container.spec.without(name)), KEEP) for container in users}
        return self.perform(data, name, act, volume, None, also=also)

    async def _engine_volume(self, name: str) -> str:
        return Path((await self.host.caller.volume(name)).mountpoint).parent.name

    def _names(self, state: object) -> list[str]:
        known = self._host.known if self._host else {}
        return sorted(name for name, container in known.items() if container.state is state)
