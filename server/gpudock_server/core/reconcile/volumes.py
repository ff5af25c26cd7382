"""Volumes that no record names: given their records again from what the engine and the disk have, or reported.

A volume with a size is its store's folder (`volume.json` says whose it is) and the engine volume that leads there; a
PLAIN one is its engine volume alone, with labels. Nothing of a volume is ever removed here.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from gpudock_server.core.listings import read_all_pages
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.core.reconcile.records import EngineContainerLabels, created_by_gpudock
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.core.volumes.engine_volumes import EngineVolumes, identity_of, mounted_engine_volumes
from gpudock_server.core.volumes.saga import revision_of
from gpudock_server.errors import GpudockError, StoreUnavailable, VolumeFailed
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.engine import LABEL_NAME, LABEL_NODE, LABEL_UID, EngineContainer, EngineVolume
from gpudock_server.model.names import is_name
from gpudock_server.model.record import now
from gpudock_server.model.store_changes import PutVolume
from gpudock_server.model.volume import (
    BackingOnDisk,
    Volume,
    VolumeBackendKind,
    VolumeBacking,
    VolumeCause,
    VolumeIdentity,
    VolumeRevision,
    VolumeState,
)
from gpudock_server.ports import Engine, Store, StoreConflict, VolumeView
from gpudock_server.sizes import size_text

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _LostVolume:
    """A volume whose record may be written again. `made`: the engine has its engine volume."""

    name: str
    uid: str
    backing: VolumeBacking
    identity: VolumeIdentity | None
    made: bool


@dataclass(frozen=True, slots=True)
class _VolumesFound:
    """What the engine and the disk had, read before the records: what a deletion removes, it removes before its record.

    `labelled` are this node's, by uid; `stores` all that are on the disk; `names` those of all engine volumes.
    """

    labelled: Mapping[str, EngineVolume]
    stores: Mapping[str, BackingOnDisk]
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class _VolumeRecords:
    """Volumes of every node, by name; and names of which nothing is touched."""

    views: Mapping[str, VolumeView]
    unreadable: frozenset[str]

    @property
    def uids(self) -> frozenset[str]:
        """Every uid, of a volume or of its store, that a record has."""
        volumes = [view.volume for view in self.views.values()]
        return frozenset([*(one.uid for one in volumes), *(one.backing.uid for one in volumes if one.backing)])

    @property
    def engine_volumes(self) -> frozenset[str]:
        """Every engine volume that a record has."""
        return frozenset(view.volume.backing.engine_volume for view in self.views.values() if view.volume.backing)


class VolumeReconciler:
    """The rules for volumes without a record."""

    def __init__(self, store: Store, engine: Engine, engine_volumes: EngineVolumes, backends: VolumeBackends) -> None:
        self._store = store
        self._engine = engine
        self._engine_volumes = engine_volumes
        self._backends = backends
        self._node = engine_volumes.node

    async def adopt(self, containers: Mapping[str, EngineContainer], report_drift: ReportDrift) -> None:
        """Write the records that are lost; `containers` are all engine containers of this node.

        Raises EngineUnavailable, StoreUnavailable.
        """
        seen = await self._find_volumes()
        records = await self._read_records()
        candidates = self._candidates(seen, records, report_drift)
        names = Counter(one.name for one in candidates)
        for one in candidates:
            if names[one.name] > 1:
                report_drift(
                    _unknown_volume_drift(
                        one.name, one.uid, one.backing, "another one of that name has no record either"
                    )
                )
            else:
                await self._adopt(one, report_drift)
        await self._adopt_foreign(containers, report_drift)

    async def _find_volumes(self) -> _VolumesFound:
        labelled = await self._engine.find_volumes({LABEL_NODE: self._node})
        stores: dict[str, BackingOnDisk] = {}
        for backend in self._backends.backends:
            try:
                stores |= {one.uid: one for one in await backend.backings_on_disk()}
            except VolumeFailed as error:
                log.warning("the stores of volumes could not be read", backend=backend.kind, detail=error.message)
        names = frozenset(await self._engine.volume_names())
        return _VolumesFound({one.labels.get(LABEL_UID, ""): one for one in labelled}, stores, names)

    async def _read_records(self) -> _VolumeRecords:
        page = await read_all_pages(self._store.volumes)
        views = {view.volume.name: view for view in page.items}
        return _VolumeRecords(views, frozenset(one.name for one in page.unreadable))

    # -- which can be adopted ----------------------------------------------------------------------------------------

    def _candidates(self, seen: _VolumesFound, records: _VolumeRecords, report_drift: ReportDrift) -> list[_LostVolume]:
        known = records.uids
        found: list[_LostVolume] = []
        for uid, engine_volume in seen.labelled.items():
            if uid not in known and (one := self._labelled(uid, engine_volume, seen, records, report_drift)):
                found.append(one)
        for uid, store in seen.stores.items():
            if (
                uid not in known
                and uid not in seen.labelled
                and (one := self._stored(store, seen, records, report_drift))
            ):
                found.append(one)
        return found

    def _labelled(
        self,
        uid: str,
        engine_volume: EngineVolume,
        seen: _VolumesFound,
        records: _VolumeRecords,
        report_drift: ReportDrift,
    ) -> _LostVolume | None:
        """A volume that has its engine volume, which has its labels."""
        name, store = engine_volume.labels.get(LABEL_NAME, ""), seen.stores.get(uid)
        backing: VolumeBacking | None
        if store is not None:
            backing, identity = store.backing, store.identity or identity_of(engine_volume)
        else:
            identity = identity_of(engine_volume)
            backing = VolumeBacking(
                kind=VolumeBackendKind.PLAIN,
                uid=uid,
                name=name,
                engine_volume=engine_volume.name,
                folder=engine_volume.mountpoint,
            )
        why = _unadoptable_reason(name, uid, records)
        if not why and backing is None and store is not None:
            why = store.damage
        elif not why and backing is not None and backing.driver_options != engine_volume.options:
            device = engine_volume.options.get("device", "nowhere")
            why = f"it leads to {device}, and no store is there that says so"
        if why or backing is None:
            if not _is_locked(name, records):
                report_drift(_unknown_volume_drift(name, uid, backing, why, engine_volume=engine_volume.name))
            return None
        return _LostVolume(name, uid, backing, identity, made=True)

    def _stored(
        self, store: BackingOnDisk, seen: _VolumesFound, records: _VolumeRecords, report_drift: ReportDrift
    ) -> _LostVolume | None:
        """A store to which no engine volume of this node leads."""
        backing, identity = store.backing, store.identity
        name = backing.name if backing else ""
        if self._is_elsewhere(store, seen, records) or _is_locked(name, records):
            # Of another node whose daemon has its stores in the same folder; or a copy that a resize is making, or the
            # store of a volume that is being made.
            return None
        why = store.damage or _unadoptable_reason(name, store.uid, records)
        if not why and identity is None:
            # A copy of a resize that was cut off, or of a version that did not keep whose store it is.
            why = "no engine volume leads to it, and it does not say of which node's volume it is the store"
        if why or backing is None:
            report_drift(_unknown_volume_drift(name, store.uid, backing, why, where=store.folder))
            return None
        return _LostVolume(name, store.uid, backing, identity, made=False)

    def _is_elsewhere(self, store: BackingOnDisk, seen: _VolumesFound, records: _VolumeRecords) -> bool:
        if store.identity is not None:
            return store.identity.node != self._node
        if f"gpudock-{store.uid}" in seen.names:
            return True
        view = records.views.get(store.backing.name) if store.backing else None
        return view is not None and view.volume.node != self._node

    # -- adopting ----------------------------------------------------------------------------------------------------

    async def _adopt(self, lost: _LostVolume, report_drift: ReportDrift) -> None:
        try:
            volume = await self._restore(lost)
            written = volume is not None and await self._record(volume)
        except StoreUnavailable:
            raise
        except GpudockError as error:
            report_drift(_unknown_volume_drift(lost.name, lost.uid, lost.backing, error.message))
            return
        if written:
            plan = f"it has its record again, with {_size(lost.backing)}"
            report_drift(_record_lost_drift(lost.name, lost.uid, lost.backing.engine_volume, plan))

    async def _restore(self, lost: _LostVolume) -> Volume | None:
        """The record, once the engine volume is there; None where it has been deleted since it was seen."""
        backing = lost.backing
        if lost.made:
            found = await self._engine.inspect_volume(backing.engine_volume)
            if found is None or found.labels.get(LABEL_UID) != lost.uid:
                return None
        else:
            again = await self._backends.of_kind(backing.kind).backings_on_disk()
            if lost.uid not in {one.uid for one in again}:
                return None
            found = await self._engine_volumes.create(backing, lost.identity)
        return self._volume(lost.name, lost.uid, backing, lost.identity, found.mountpoint)

    def _volume(
        self, name: str, uid: str, backing: VolumeBacking, identity: VolumeIdentity | None, mountpoint: str
    ) -> Volume:
        moment, said = now(), identity or VolumeIdentity()
        return Volume(
            name=name,
            uid=uid,
            node=self._node,
            owner=said.owner,
            # No etag from before the loss names this state: how often it was changed is not known any more.
            generation=int(moment.timestamp()),
            revision=1,
            state=VolumeState.READY,
            size_bytes=backing.size_bytes,
            reserved_bytes=backing.size_bytes,
            labels=said.labels,
            backing=backing,
            mountpoint=mountpoint,
            create_time=said.create_time or moment,
            update_time=moment,
        )

    async def _record(self, volume: Volume) -> bool:
        """Write it, unless somebody was quicker."""
        # Of a record that alone was lost, the history is still there.
        history: tuple[VolumeRevision, ...] = (
            await read_all_pages(partial(self._store.volume_revisions, volume.uid))
        ).items
        last = max((one.revision for one in history), default=0)
        volume = volume.changed(revision=last + 1)
        try:
            await self._store.apply([PutVolume(volume, expect=0), revision_of(volume, VolumeCause.ADOPTED, "")])
        except StoreConflict:
            return False
        return True

    # -- engine volumes that are not gpudock's -----------------------------------------------------------------------

    async def _adopt_foreign(self, containers: Mapping[str, EngineContainer], report_drift: ReportDrift) -> None:
        """Volumes that were adopted as they are have no labels: containers that mount them say what they are called."""
        used: defaultdict[str, set[str]] = defaultdict(set)
        for one in created_by_gpudock(containers):
            if one.spec is not None:
                for name, engine_volume in mounted_engine_volumes(one, one.spec.mounts).items():
                    used[name].add(engine_volume)
        if not used:
            return
        records = await self._read_records()
        for name, engine_volumes in sorted(used.items()):
            if name not in records.views and name not in records.unreadable:
                await self._adopt_mounted(name, sorted(engine_volumes), records, containers, report_drift)

    async def _adopt_mounted(
        self,
        name: str,
        engine_volumes: Sequence[str],
        records: _VolumeRecords,
        containers: Mapping[str, EngineContainer],
        report_drift: ReportDrift,
    ) -> None:
        user = next(
            (
                EngineContainerLabels.of(one).name
                for one in containers.values()
                if engine_volumes[0] in one.volumes.values()
            ),
            "",
        )
        found = await self._engine.inspect_volume(engine_volumes[0])
        if found is None or LABEL_UID in found.labels:
            # Which is gone, or was judged by its labels.
            return
        if len(engine_volumes) > 1 or found.name in records.engine_volumes or not is_name(name):
            why = f"containers have {' and '.join(engine_volumes)} mounted for it"
            if len(engine_volumes) == 1:
                why = f"container {user} has {found.name} mounted for it, which is another volume's by its record"
            report_drift(_unknown_volume_drift(name, "", None, why, engine_volume=found.name))
            return
        uid = str(uuid.uuid4())
        backing = VolumeBacking(
            kind=VolumeBackendKind.PLAIN, uid=uid, name=name, engine_volume=found.name, folder=found.mountpoint
        )
        if await self._record(self._volume(name, uid, backing, None, found.mountpoint)):
            plan = f"it has a record again, from the mount of container {user}; its owner and labels are not known"
            report_drift(_record_lost_drift(name, uid, found.name, plan))


def _is_locked(name: str, records: _VolumeRecords) -> bool:
    view = records.views.get(name)
    return view is not None and bool(view.operation_id)


def _unadoptable_reason(name: str, uid: str, records: _VolumeRecords) -> str:
    """Why nothing can be written under its name; empty where it can."""
    if not is_name(name):
        return f"it says that it is volume {name!r}, which is no name"
    try:
        uuid.UUID(uid)
    except ValueError:
        return f"its uid {uid!r} is no UUID"
    if name in records.unreadable:
        return f"the record of volume {name} cannot be read"
    if name in records.views:
        return f"another volume is called {name}; delete that, and this one gets its record again"
    return ""


def _size(backing: VolumeBacking) -> str:
    return size_text(backing.size_bytes) if backing.size_bytes else "no size"


def _record_lost_drift(name: str, uid: str, engine_volume: str, plan: str) -> Drift:
    return Drift(
        kind=DriftKind.VOLUME_RECORD_LOST,
        remedy=DriftRemedy.REPAIRED,
        volume=name,
        uid=uid,
        engine_name=engine_volume,
        message=f"volume {name} has no record, and its files are there",
        plan=plan,
    )


def _unknown_volume_drift(
    name: str, uid: str, backing: VolumeBacking | None, why: str, *, engine_volume: str = "", where: str = ""
) -> Drift:
    where = where or (backing.folder if backing else "") or engine_volume
    return Drift(
        kind=DriftKind.VOLUME_UNKNOWN,
        remedy=DriftRemedy.REPORTED,
        volume=name,
        uid=uid,
        engine_name=engine_volume or (backing.engine_volume if backing else ""),
        actual=where,
        message=f"no record names the volume {name or uid} in {where}: {why}",
        plan=(
            "nothing is removed: take out of the way what stands against it; or copy its files elsewhere, then remove"
            " its engine volume with `docker volume rm` and its folder"
        ),
    )
