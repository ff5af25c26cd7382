"""Adopts volumes that have no record, from what the engine and the disk have, or reports them.

A volume with a size has a backing folder, whose `volume.json` identifies the volume, and an engine volume that points
to the folder. A PLAIN volume has only its engine volume, with labels. Reconcile never removes anything of a volume.
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
    """A volume whose record can be restored. `has_engine_volume`: its engine volume exists."""

    name: str
    uid: str
    backing: VolumeBacking
    identity: VolumeIdentity | None
    has_engine_volume: bool


@dataclass(frozen=True, slots=True)
class _VolumesFound:
    """Engine volumes and backings. They are read before the records, since a deletion removes the record last.

    `labelled`: the engine volumes of this node, by uid; `backings`: all backings on the disk, by uid; `names`: the
    names of all engine volumes.
    """

    labelled: Mapping[str, EngineVolume]
    backings: Mapping[str, BackingOnDisk]
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class _VolumeRecords:
    """The volume records of every node, by name, and the names of unreadable ones, which are not adopted."""

    views: Mapping[str, VolumeView]
    unreadable: frozenset[str]

    @property
    def uids(self) -> frozenset[str]:
        """The uids of all volumes with a record, and of their backings."""
        volumes = [view.volume for view in self.views.values()]
        return frozenset(
            [*(volume.uid for volume in volumes), *(volume.backing.uid for volume in volumes if volume.backing)]
        )

    @property
    def engine_volumes(self) -> frozenset[str]:
        """The names of the engine volumes of all records."""
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
        """Adopt or report volumes without a record. `containers` are all engine containers of this node, by id.

        Raises EngineUnavailable, StoreUnavailable.
        """
        found = await self._find_volumes()
        records = await self._read_records()
        candidates = self._candidates(found, records, report_drift)
        names = Counter(lost.name for lost in candidates)
        for lost in candidates:
            if names[lost.name] > 1:
                reason = "another volume of that name has no record either"
                report_drift(_unknown_volume_drift(lost.name, lost.uid, lost.backing, reason))
            else:
                await self._adopt(lost, report_drift)
        await self._adopt_foreign(containers, report_drift)

    async def _find_volumes(self) -> _VolumesFound:
        labelled = await self._engine.find_volumes({LABEL_NODE: self._node})
        backings: dict[str, BackingOnDisk] = {}
        for backend in self._backends.backends:
            try:
                backings |= {backing.uid: backing for backing in await backend.backings_on_disk()}
            except VolumeFailed as error:
                log.warning("listing volume backings failed", backend=backend.kind, detail=error.message)
        names = frozenset(await self._engine.volume_names())
        return _VolumesFound({volume.labels.get(LABEL_UID, ""): volume for volume in labelled}, backings, names)

    async def _read_records(self) -> _VolumeRecords:
        page = await read_all_pages(self._store.volumes)
        views = {view.volume.name: view for view in page.items}
        return _VolumeRecords(views, frozenset(key.name for key in page.unreadable))

    # -- finding volumes without a record ----------------------------------------------------------------------------

    def _candidates(
        self, found: _VolumesFound, records: _VolumeRecords, report_drift: ReportDrift
    ) -> list[_LostVolume]:
        recorded = records.uids
        candidates = [
            self._from_engine_volume(uid, engine_volume, found, records, report_drift)
            for uid, engine_volume in found.labelled.items()
            if uid not in recorded
        ]
        candidates += [
            self._from_backing(on_disk, found, records, report_drift)
            for uid, on_disk in found.backings.items()
            if uid not in recorded and uid not in found.labelled
        ]
        return [lost for lost in candidates if lost is not None]

    def _from_engine_volume(
        self,
        uid: str,
        engine_volume: EngineVolume,
        found: _VolumesFound,
        records: _VolumeRecords,
        report_drift: ReportDrift,
    ) -> _LostVolume | None:
        """The volume of an engine volume with labels; None, and reported, where it cannot be adopted."""
        name, on_disk = engine_volume.labels.get(LABEL_NAME, ""), found.backings.get(uid)
        backing: VolumeBacking | None
        if on_disk is not None:
            backing, identity = on_disk.backing, on_disk.identity or identity_of(engine_volume)
        else:
            identity = identity_of(engine_volume)
            backing = VolumeBacking(
                kind=VolumeBackendKind.PLAIN,
                uid=uid,
                name=name,
                engine_volume=engine_volume.name,
                folder=engine_volume.mountpoint,
            )
        reason = _unadoptable_reason(name, uid, records)
        if not reason and backing is None and on_disk is not None:
            reason = on_disk.damage
        elif not reason and backing is not None and backing.driver_options != engine_volume.options:
            device = engine_volume.options.get("device", "nowhere")
            reason = f"points to {device}, which is not the backing of this volume"
        if reason or backing is None:
            if not _is_locked(name, records):
                report_drift(_unknown_volume_drift(name, uid, backing, reason, engine_volume=engine_volume.name))
            return None
        return _LostVolume(name, uid, backing, identity, has_engine_volume=True)

    def _from_backing(
        self, on_disk: BackingOnDisk, found: _VolumesFound, records: _VolumeRecords, report_drift: ReportDrift
    ) -> _LostVolume | None:
        """The volume of a backing without an engine volume of this node; None where it cannot be adopted.

        Reported, except where the backing belongs to another node or to an operation.
        """
        backing, identity = on_disk.backing, on_disk.identity
        name = backing.name if backing else ""
        if self._is_elsewhere(on_disk, found, records) or _is_locked(name, records):
            # The daemon of another node may use the same folder. With a lock, this is the new backing of a resize or
            # of a volume that is being created.
            return None
        reason = on_disk.damage or _unadoptable_reason(name, on_disk.uid, records)
        if not reason and identity is None:
            # The copy of an interrupted resize, or a backing of a version that wrote no identity.
            reason = "no engine volume points to it, and it names no node"
        if reason or backing is None:
            report_drift(_unknown_volume_drift(name, on_disk.uid, backing, reason, folder=on_disk.folder))
            return None
        return _LostVolume(name, on_disk.uid, backing, identity, has_engine_volume=False)

    def _is_elsewhere(self, on_disk: BackingOnDisk, found: _VolumesFound, records: _VolumeRecords) -> bool:
        """Whether a backing belongs to another node."""
        if on_disk.identity is not None:
            return on_disk.identity.node != self._node
        if f"gpudock-{on_disk.uid}" in found.names:
            return True
        view = records.views.get(on_disk.backing.name) if on_disk.backing else None
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
            plan = f"record restored, with {_size(lost.backing)}"
            report_drift(_record_lost_drift(lost.name, lost.uid, lost.backing.engine_volume, plan))

    async def _restore(self, lost: _LostVolume) -> Volume | None:
        """The record of a volume; None where it was deleted. Creates the engine volume where it is missing."""
        backing = lost.backing
        if lost.has_engine_volume:
            found = await self._engine.inspect_volume(backing.engine_volume)
            if found is None or found.labels.get(LABEL_UID) != lost.uid:
                return None
        else:
            on_disk = await self._backends.of_kind(backing.kind).backings_on_disk()
            if lost.uid not in {current.uid for current in on_disk}:
                return None
            found = await self._engine_volumes.create(backing, lost.identity)
        return self._volume(lost.name, lost.uid, backing, lost.identity, found.mountpoint)

    def _volume(
        self, name: str, uid: str, backing: VolumeBacking, identity: VolumeIdentity | None, mountpoint: str
    ) -> Volume:
        moment, identity = now(), identity or VolumeIdentity()
        return Volume(
            name=name,
            uid=uid,
            node=self._node,
            owner=identity.owner,
            # The generation before the loss is unknown; a time is greater, so that no earlier etag matches.
            generation=int(moment.timestamp()),
            revision=1,
            state=VolumeState.READY,
            size_bytes=backing.size_bytes,
            reserved_bytes=backing.size_bytes,
            labels=identity.labels,
            backing=backing,
            mountpoint=mountpoint,
            create_time=identity.create_time or moment,
            update_time=moment,
        )

    async def _record(self, volume: Volume) -> bool:
        """Write a record; False if a volume of that name has one already."""
        # Where only the record was lost, its history still exists.
        history: tuple[VolumeRevision, ...] = (
            await read_all_pages(partial(self._store.volume_revisions, volume.uid))
        ).items
        last = max((revision.revision for revision in history), default=0)
        volume = volume.changed(revision=last + 1)
        try:
            await self._store.apply([PutVolume(volume, expect=0), revision_of(volume, VolumeCause.ADOPTED, "")])
        except StoreConflict:
            return False
        return True

    # -- engine volumes without labels -------------------------------------------------------------------------------

    async def _adopt_foreign(self, containers: Mapping[str, EngineContainer], report_drift: ReportDrift) -> None:
        """Adopt engine volumes without labels, which AdoptVolume without a size made volumes.

        Their names are taken from the specs of the containers that mount them.
        """
        used: defaultdict[str, set[str]] = defaultdict(set)
        for container in created_by_gpudock(containers):
            if container.spec is not None:
                for name, engine_volume in mounted_engine_volumes(container, container.spec.mounts).items():
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
                EngineContainerLabels.of(container).name
                for container in containers.values()
                if engine_volumes[0] in container.volumes.values()
            ),
            "",
        )
        found = await self._engine.inspect_volume(engine_volumes[0])
        if found is None or LABEL_UID in found.labels:
            # It is gone, or has labels and was handled by them.
            return
        if len(engine_volumes) > 1 or found.name in records.engine_volumes or not is_name(name):
            reason = f"containers mount different engine volumes for it: {', '.join(engine_volumes)}"
            if len(engine_volumes) == 1:
                reason = f"container {user} mounts {found.name} for it, which the record of another volume has"
            report_drift(_unknown_volume_drift(name, "", None, reason, engine_volume=found.name))
            return
        uid = str(uuid.uuid4())
        backing = VolumeBacking(
            kind=VolumeBackendKind.PLAIN, uid=uid, name=name, engine_volume=found.name, folder=found.mountpoint
        )
        if await self._record(self._volume(name, uid, backing, None, found.mountpoint)):
            plan = f"record restored from the mount of container {user}; owner and labels are unknown"
            report_drift(_record_lost_drift(name, uid, found.name, plan))


def _is_locked(name: str, records: _VolumeRecords) -> bool:
    view = records.views.get(name)
    return view is not None and bool(view.operation_id)


def _unadoptable_reason(name: str, uid: str, records: _VolumeRecords) -> str:
    """Why no record can be written for a volume; empty where it can."""
    if not is_name(name):
        return f"invalid volume name {name!r}"
    try:
        uuid.UUID(uid)
    except ValueError:
        return f"invalid uid {uid!r}; it must be a UUID"
    if name in records.unreadable:
        return f"the record of volume {name} is unreadable"
    if name in records.views:
        return f"the name {name} is taken; delete that volume to have this one adopted"
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
        message=f"volume {name} had lost its record",
        plan=plan,
    )


def _unknown_volume_drift(
    name: str, uid: str, backing: VolumeBacking | None, reason: str, *, engine_volume: str = "", folder: str = ""
) -> Drift:
    place = folder or (backing.folder if backing else "") or engine_volume
    return Drift(
        kind=DriftKind.VOLUME_UNKNOWN,
        remedy=DriftRemedy.REPORTED,
        volume=name,
        uid=uid,
        engine_name=engine_volume or (backing.engine_volume if backing else ""),
        actual=place,
        message=f"volume {name or uid} in {place} has no record: {reason}",
        plan=(
            "no automatic repair: remove the cause; or copy the files elsewhere, then remove the engine volume with"
            " `docker volume rm`, and the folder"
        ),
    )
