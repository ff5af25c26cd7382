"""The rules of volumes: requests that change them or must be refused, and writes."""

from __future__ import annotations

import uuid
from pathlib import Path

from gpudock.v1 import volume_service_pb2
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.calls import Caller, progress_of
from tests.stateful.docker_commands import foreign_container
from tests.stateful.model import ExpectedContainer, ExpectedVolume, containers_mounting
from tests.stateful.requests import prune_revisions
from tests.stateful.rule_base import EXITED, KEEP, PAUSED, RUNNING, STOPPED, VOLUMES, RuleBase, counted
from tests.stateful.sequence_shrinker import Draws

_MIB = 1 << 20
_FILES = st.sampled_from(("a", "b"))
_CONTENTS = st.sampled_from(("red", "green", "", None))
# The smallest size and the step; XFS needs at least 236 MiB.
_SMALLEST_MIB = 240
_STEP_MIB = 16
_SIZES = st.sampled_from((0, _SMALLEST_MIB))


class VolumeRules(RuleBase):
    """See the module's docstring."""

    def _volume(self, data: Draws) -> ExpectedVolume:
        return self.host.volumes[data.choose(sorted(self.host.volumes), "volume")]

    def _users(self, volume: str) -> list[ExpectedContainer]:
        return [self.host.containers[name] for name in containers_mounting(self.host.containers.values(), volume)]

    def _free_volume(self, data: Draws) -> str:
        free = [name for name in VOLUMES if name not in self.host.volumes]
        return data.choose(free, "volume")

    @precondition(lambda self: len(self.host.volumes) < len(VOLUMES))
    @rule(data=st.data(), size_mib=_SIZES)
    @counted
    def create_volume(self, data: Draws, size_mib: int) -> None:
        """Create a volume, with or without a size."""
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
        """Adopt an engine volume as it is, or copied into a volume with a size."""
        name, theirs, engine = self._free_volume(data), f"theirs-{uuid.uuid4()}", self.host.rig.engine
        made = engine.call("POST", "/volumes/create", send={"Name": theirs, "Labels": {"gpudock.adopt": "true"}})
        Path(made["Mountpoint"], "theirs").write_text(name)
        request = volume_service_pb2.AdoptVolumeRequest(name=name, engine_volume=theirs, size_bytes=size_mib * _MIB)
        after = ExpectedVolume(name, (size_mib,), {"theirs": name}, adopted="" if size_mib else theirs)
        self.perform(data, name, lambda caller: progress_of(caller.volumes.AdoptVolume(request)), None, after)
        if size_mib or name not in self.host.volumes:
            # The engine volume is unchanged.
            assert Path(made["Mountpoint"], "theirs").read_text() == name
            engine.call("DELETE", f"/volumes/{theirs}")

    @precondition(lambda self: any(self.host.containers[name].spec.mounts for name in self._names(RUNNING)))
    @rule(data=st.data(), file=_FILES, content=_CONTENTS)
    @counted
    def write_in_volume(self, data: Draws, file: str, content: str | None) -> None:
        """Write a file of a volume in one container; all others must see it."""
        places = [(name, path) for name in self._names(RUNNING) for path, _ in self.host.containers[name].spec.mounts]
        name, target = data.choose(places, "where")
        self.loop.run(self.host.write_in_volume(name, target, file, content))
        self.tally["write in volume"] += 1

    @precondition(lambda self: any(volume.size_mib for volume in self.host.volumes.values()))
    @rule(data=st.data(), shrink=st.sampled_from((False,) * 4 + (True,)))
    @counted
    def resize_volume(self, data: Draws, shrink: bool) -> None:
        """Grow a volume in place, or shrink it by a copy, for which its containers are stopped and started."""
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
    @rule(data=st.data(), force=st.booleans(), foreign=st.sampled_from((False,) * 4 + (True,)))
    @counted
    def delete_volume(self, data: Draws, force: bool, foreign: bool) -> None:
        """Delete a volume. A container that mounts it prevents that; with force only a running one does."""
        volume = self._volume(data)
        name, users = volume.name, self._users(volume.name)
        blockers = [container.name for container in users if not force or container.state not in (STOPPED, EXITED)]

        async def act(caller: Caller) -> None:
            await caller.delete_volume(name, force=force)

        if foreign:
            # An engine container that the daemon does not manage prevents it, too.
            with foreign_container(self.host.rig, self.loop.run(self._engine_volume(name))) as other:
                return self.refused(act, "VOLUME_IN_USE", name, *blockers, holders=blockers or [other])
        if blockers:
            return self.refused(act, "VOLUME_IN_USE", name, *blockers, holders=blockers)
        also = {
            container.name: prune_revisions(container.changed(container.spec.without(name)), KEEP)
            for container in users
        }
        return self.perform(data, name, act, volume, None, also=also)

    async def _engine_volume(self, name: str) -> str:
        return Path((await self.host.caller.volume(name)).mountpoint).parent.name

    def _names(self, state: object) -> list[str]:
        known = self._host.containers if self._host else {}
        return sorted(name for name, container in known.items() if container.state is state)
