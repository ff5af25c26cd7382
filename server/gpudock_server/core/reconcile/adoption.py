"""Adopts, removes or reports orphans: engine containers that gpudock created and that no record binds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import structlog

from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.history import revision_of
from gpudock_server.core.containers.layer_images import layer_image_name_of
from gpudock_server.core.containers.new_container import anonymous_volumes
from gpudock_server.core.containers.operation_history import read_operation_history
from gpudock_server.core.containers.status import observed_status
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.operations.journal import Journal
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.core.reconcile.orphans import Orphan, OrphanAction, OrphanClassifier
from gpudock_server.core.reconcile.records import (
    ContainerRecords,
    EngineContainerLabels,
    claim_text,
    created_by_gpudock,
    placement_of,
)
from gpudock_server.errors import (
    EngineRejected,
    GpudockError,
)
from gpudock_server.model.claims import ClaimKey, Holder, claim_keys
from gpudock_server.model.container import (
    Container,
    ContainerRevision,
    ContainerState,
    ContainerStatus,
    EngineBinding,
    Placement,
    RevisionCause,
)
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.engine import LABEL_OWNER, EngineContainer
from gpudock_server.model.operation import Operation, OperationState
from gpudock_server.model.record import now
from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import (
    PutContainer,
    PutOperation,
    PutRevision,
    StoreChange,
)
from gpudock_server.ports import ContainerView, Engine, RevisionBackupStore, Store, StoreConflict, Versioned

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ClaimConflict(Exception):
    """Another container holds a GPU or port of the engine container."""

    def __init__(self, key: ClaimKey, holder: Holder) -> None:
        super().__init__(f"{claim_text(key)} is held by {holder.container}")
        self.key = key
        self.holder = holder


class OrphanReconciler:
    """The rules for orphans; see `orphans`."""

    def __init__(
        self,
        operations: Operations,
        *,
        store: Store,
        engine: Engine,
        engine_containers: EngineContainers,
        revision_backups: RevisionBackupStore,
        claims: HostClaims,
        grace: float,
    ) -> None:
        """`grace`: seconds from the first sight of an orphan to its removal."""
        self._store = store
        self._engine = engine
        self._engine_containers = engine_containers
        self._revision_backups = revision_backups
        self._host_claims = claims
        self._operations = operations
        self._grace = grace
        # Monotonic time at which an orphan was first found, by engine id.
        self._orphans_since: dict[str, float] = {}

    # -- classifying -------------------------------------------------------------------------------------------------

    async def classify(
        self, engine_containers: Mapping[str, EngineContainer], records: ContainerRecords
    ) -> tuple[Orphan, ...]:
        """Find and classify the orphans. `engine_containers` must be read before `records`."""
        unbound = [
            engine_container
            for engine_container in created_by_gpudock(engine_containers)
            if engine_container.id not in records.bound
        ]
        if not unbound:
            return ()
        unfinished = {stored.value.id for stored in await self._store.unfinished(self._host_claims.node)}
        uids = {EngineContainerLabels.of(engine_container).uid for engine_container in unbound}
        history = await read_operation_history(self._store, uids)
        unfinished |= self._operations.driven
        return OrphanClassifier(records, history, unfinished, engine_containers).classify(unbound)

    # -- adopting ----------------------------------------------------------------------------------------------------

    async def adopt(
        self, orphans: Iterable[Orphan], records: ContainerRecords, action: OrphanAction, report_drift: ReportDrift
    ) -> bool:
        """Adopt the orphans with this action; whether any was adopted."""
        chosen = [orphan for orphan in orphans if orphan.action is action]
        return any(
            [await self._adopt(orphan, records.views.get(orphan.labels.name), report_drift) for orphan in chosen]
        )

    async def _adopt(self, orphan: Orphan, view: ContainerView | None, report_drift: ReportDrift) -> bool:
        kind = DriftKind.CONTAINER_NEWER if view else DriftKind.RECORD_LOST
        try:
            adopted = await self.write_record(orphan.engine_container, view)
        except ClaimConflict as conflict:
            report_drift(
                _orphan_drift(
                    orphan,
                    kind,
                    DriftRemedy.REPORTED,
                    f"no automatic repair while {conflict}: stop or delete the holder",
                    claim=claim_text(conflict.key),
                    other=conflict.holder.container,
                )
            )
            return False
        if adopted:
            report_drift(_orphan_drift(orphan, kind, DriftRemedy.REPAIRED, "record restored"))
        return adopted

    async def write_record(
        self, engine_container: EngineContainer, view: ContainerView | None, ending: Versioned[Operation] | None = None
    ) -> bool:
        """Write the records of an engine container, and end an operation in the same transaction.

        False where the engine or a record has changed since. Raises ClaimConflict.
        """
        # A deletion removes the engine container first and the record last. So an engine container that still exists
        # was not deleted since the records were read.
        fresh = await self._engine.inspect(engine_container.id)
        if fresh is None or fresh.spec is None:
            return False
        if view is not None and view.container.engine is not None:
            bound = await self._engine.inspect(view.container.engine.engine_id)
            if bound is not None:
                return False
        container, changes = await self._rebuild_record(fresh, view)
        if ending is not None:
            changes = [*changes, *_end_changes(ending, container)]
        try:
            await self._store.apply(changes)
        except StoreConflict:
            # A record has changed since; the next pass reads it again.
            return False
        return True

    async def _rebuild_record(
        self, engine_container: EngineContainer, view: ContainerView | None
    ) -> tuple[Container, list[StoreChange]]:
        labels = EngineContainerLabels.of(engine_container)
        if engine_container.spec is None:
            raise ValueError(f"{engine_container.name} has no spec label")
        known = [stored.revision for stored in await self._store.history(labels.uid)]
        backups = await self._read_backups(labels.uid)
        backup = _last_backup_of(engine_container, labels.revision, backups)
        if backup is not None:
            number, spec = backup.number, backup.revision.spec
        else:
            revisions = [*known, *(stored.revision for stored in backups)]
            number, spec = _latest_revision(engine_container.spec, labels.revision, revisions)
        engine_placement = placement_of(spec, engine_container)
        # A container that does not run holds nothing; its next start claims what it needs.
        placement = engine_placement if engine_container.running else Placement()
        node = self._host_claims.node
        before = view.container if view else _empty_container(engine_container, labels, node, backups)
        binding = EngineBinding(
            engine_id=engine_container.id,
            engine_name=engine_container.name,
            image_id=engine_container.image_id,
            placement=engine_placement,
            fixed_digest=spec.fixed_digest,
            anonymous_volumes=anonymous_volumes(spec, engine_container.volumes),
            layer_images=await self._layer_images(before, labels),
        )
        if backup is not None and backup.engine is not None:
            stored_binding = backup.engine
            binding = binding.model_copy(
                update={
                    "layer_images": stored_binding.layer_images,
                    "base_image_id": stored_binding.base_image_id,
                    "base_depth": stored_binding.base_depth,
                }
            )
        container = before.changed(
            spec=spec,
            revision=number,
            generation=max(before.generation, number) + 1,
            update_time=now(),
            engine=binding,
        ).with_status(
            state=ContainerState.STOPPED, placement=placement, holds_resources=engine_container.running, message=""
        )
        container = container.changed(status=observed_status(container, engine_container))
        changes: list[StoreChange] = [PutContainer(container, expect=view.version if view else 0)]
        if number not in {revision.revision for revision in known}:
            revision = backup.revision if backup else _adopted_revision(container, engine_placement, labels)
            changes.append(PutRevision(revision))
        return container, [*changes, *await self._claims(container, before.status.placement)]

    async def _read_backups(self, uid: str) -> tuple[RevisionBackup, ...]:
        try:
            return await self._revision_backups.read(uid)
        except GpudockError as error:
            log.warning("revision backup read failed", uid=uid, detail=error.message)
            return ()

    async def _layer_images(self, container: Container, labels: EngineContainerLabels) -> tuple[str, ...]:
        recorded = container.engine.layer_images if container.engine else ()
        image = layer_image_name_of(labels.operation_id)
        if image in recorded or await self._engine.image(image) is None:
            return recorded
        return (*recorded, image)

    async def _claims(self, container: Container, before: Placement) -> list[StoreChange]:
        claims = self._host_claims
        table = await self._store.claims(claims.host)
        changes: list[StoreChange] = []
        keys = claim_keys(container.status.placement)
        for key in keys:
            found = table.holder(key)
            if found is not None and found.uid != container.uid:
                raise ClaimConflict(key, found)
            changes += (claims.confirm if found else claims.claim)(container, [key])
        held = dict.fromkeys((*claim_keys(before), *table.claims_of_container(container.uid)))
        return [*changes, *claims.release(container.uid, [key for key in held if key not in keys])]

    # -- removing ----------------------------------------------------------------------------------------------------

    async def remove(self, orphans: Sequence[Orphan], report_drift: ReportDrift) -> None:
        """Remove the orphans with action REMOVED after their grace; report those with action REPORTED."""
        removable = {orphan.engine_container.id: orphan for orphan in orphans if orphan.action is OrphanAction.REMOVED}
        moment = time.monotonic()
        self._orphans_since = {engine_id: self._orphans_since.get(engine_id, moment) for engine_id in removable}
        for orphan in orphans:
            if orphan.action is OrphanAction.REPORTED:
                report_drift(
                    _orphan_drift(orphan, DriftKind.CONTAINER_UNKNOWN, DriftRemedy.REPORTED, "no automatic repair")
                )
        for engine_id, orphan in removable.items():
            remaining = self._grace - (moment - self._orphans_since[engine_id])
            if remaining > 0:
                report_drift(
                    _orphan_drift(
                        orphan,
                        DriftKind.CONTAINER_UNKNOWN,
                        DriftRemedy.PENDING,
                        f"will be removed by the first pass after {self._grace:g} s",
                    ).model_copy(update={"due_time": now() + timedelta(seconds=remaining)})
                )
            else:
                await self._remove(orphan, report_drift)

    async def _remove(self, orphan: Orphan, report_drift: ReportDrift) -> None:
        try:
            await self._engine_containers.remove(orphan.engine_container.id, orphan.engine_container.name)
        except EngineRejected as error:
            plan = f"removal rejected by the engine; will retry: {error.detail}"
            report_drift(_orphan_drift(orphan, DriftKind.CONTAINER_UNKNOWN, DriftRemedy.RETRIED, plan))
            return
        del self._orphans_since[orphan.engine_container.id]
        report_drift(_orphan_drift(orphan, DriftKind.CONTAINER_UNKNOWN, DriftRemedy.REPAIRED, "removed"))


def _latest_revision(
    created_spec: ContainerSpec, number: int, revisions: Sequence[ContainerRevision]
) -> tuple[int, ContainerSpec]:
    """The current revision and spec of an engine container that was created as revision `number`.

    `revisions` include those that changed it in place.
    """
    last = max(revisions, key=lambda revision: revision.revision, default=None)
    if last is None or last.revision <= number:
        return number, created_spec
    return last.revision, last.spec if last.spec.fixed_digest == created_spec.fixed_digest else created_spec


def _last_backup_of(
    engine_container: EngineContainer, number: int, backups: Sequence[RevisionBackup]
) -> RevisionBackup | None:
    """The last of all revisions, if this engine container, created as revision `number`, was the one that served it."""
    served = [
        backup for backup in backups if backup.engine is not None and backup.engine.engine_id == engine_container.id
    ]
    last = max(served, key=lambda backup: backup.number, default=None)
    if last is None or last.number < number or any(backup.number > last.number for backup in backups):
        return None
    return last


def _empty_container(
    engine_container: EngineContainer, labels: EngineContainerLabels, node: str, backups: Sequence[RevisionBackup]
) -> Container:
    """A container record in state CREATING, as before its first revision."""
    if engine_container.spec is None:
        raise ValueError(f"{engine_container.name} has no spec label")
    last = backups[-1] if backups else None
    return Container(
        name=labels.name,
        uid=labels.uid,
        node=node,
        owner=engine_container.labels.get(LABEL_OWNER, ""),
        generation=0,
        revision=0,
        spec=engine_container.spec,
        status=ContainerStatus(state=ContainerState.CREATING),
        create_time=(last.create_time if last else engine_container.create_time) or now(),
        update_time=now(),
    )


def _adopted_revision(container: Container, placement: Placement, labels: EngineContainerLabels) -> ContainerRevision:
    revision = revision_of(container, RevisionCause.ADOPTED, labels.operation_id)
    return revision.model_copy(update={"placement": placement})


def _end_changes(stored: Versioned[Operation], container: Container) -> list[StoreChange]:
    """The changes that end an operation: as SUCCEEDED, or as FAILED if it has an error."""
    operation = stored.value
    if operation.error is not None:
        state = OperationState.FAILED
    else:
        state, operation = OperationState.SUCCEEDED, operation.changed(committed=True, result=container)
    ended, changes = Journal.close_record(operation.changed(update_time=now()), state, ())
    return [*changes, PutOperation(ended, expect=stored.version)]


def _orphan_drift(
    orphan: Orphan, kind: DriftKind, remedy: DriftRemedy, plan: str, *, claim: str = "", other: str = ""
) -> Drift:
    engine_container, labels = orphan.engine_container, orphan.labels
    return Drift(
        kind=kind,
        remedy=remedy,
        container=labels.name,
        uid=labels.uid,
        engine_id=engine_container.id,
        engine_name=engine_container.name,
        operation_id=labels.operation_id,
        claim=claim,
        other=other,
        actual=f"revision {labels.revision}, {engine_container.state.value}",
        message=f"orphan engine container {engine_container.name}: {orphan.reason}",
        plan=plan,
    )
