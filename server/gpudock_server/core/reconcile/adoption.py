"""Engine containers that are ours and that no record binds: given their records again, removed, or reported."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import timedelta

import structlog

from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.layer_images import layer_image_name_of
from gpudock_server.core.containers.new_container import anonymous_volumes
from gpudock_server.core.containers.operation_history import read_operation_history
from gpudock_server.core.containers.status import observed_status
from gpudock_server.core.operations.driver import recorded_error
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
    ContainerNotFound,
    EngineRejected,
    GpudockError,
    OperationOvertaken,
    RecordUnreadable,
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
from gpudock_server.model.operation import Operation, OperationKind, OperationState
from gpudock_server.model.record import now
from gpudock_server.model.resource import ResourceKind
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


class _ClaimConflict(Exception):
    """Something that it was given is held by another."""

    def __init__(self, key: ClaimKey, holder: Holder) -> None:
        super().__init__(f"{claim_text(key)} is held by {holder.container}")
        self.key = key
        self.holder = holder


class OrphanReconciler:
    """The rules for what no record binds."""

    def __init__(
        self,
        operations: Operations,
        *,
        store: Store,
        engine: Engine,
        engine_containers: EngineContainers,
        ledger: RevisionBackupStore,
        claims: HostClaims,
        grace: float,
    ) -> None:
        """`grace`: for how many seconds one that is to be removed is left alone."""
        self._store = store
        self._engine = engine
        self._engine_containers = engine_containers
        self._ledger = ledger
        self._host_claims = claims
        self._operations = operations
        self._grace = grace
        # When each was first found, by engine id.
        self._orphans_since: dict[str, float] = {}

    # -- judging -----------------------------------------------------------------------------------------------------

    async def classify(self, seen: Mapping[str, EngineContainer], records: ContainerRecords) -> tuple[Orphan, ...]:
        """What is to become of each; `seen` is older than `records`."""
        unbound = [one for one in created_by_gpudock(seen) if one.id not in records.bound]
        if not unbound:
            return ()
        unfinished = {stored.value.id for stored in await self._store.unfinished(self._host_claims.node)}
        history = await read_operation_history(self._store, {EngineContainerLabels.of(one).uid for one in unbound})
        return OrphanClassifier(records, history, unfinished | self._operations.driven, seen).classify(unbound)

    # -- adopting ----------------------------------------------------------------------------------------------------

    async def adopt(
        self, orphans: Iterable[Orphan], records: ContainerRecords, action: OrphanAction, report_drift: ReportDrift
    ) -> bool:
        """Give records to those with that fate; whether any was given one."""
        chosen = [orphan for orphan in orphans if orphan.action is action]
        return any(
            [await self._adopt(orphan, records.views.get(orphan.labels.name), report_drift) for orphan in chosen]
        )

    async def _adopt(self, orphan: Orphan, view: ContainerView | None, report_drift: ReportDrift) -> bool:
        kind = DriftKind.CONTAINER_NEWER if view else DriftKind.RECORD_LOST
        try:
            adopted = await self._write_record(orphan.one, view)
        except _ClaimConflict as taken:
            held = f"{claim_text(taken.key)} is held by {taken.holder.container}"
            report_drift(
                _orphan_drift(
                    orphan,
                    kind,
                    DriftRemedy.REPORTED,
                    f"nothing while {held}: stop or delete that",
                    claim=claim_text(taken.key),
                    other=taken.holder.container,
                )
            )
            return False
        if adopted:
            plan = "it has its record again"
            report_drift(_orphan_drift(orphan, kind, DriftRemedy.REPAIRED, plan))
        return adopted

    async def _write_record(
        self, one: EngineContainer, view: ContainerView | None, ending: Versioned[Operation] | None = None
    ) -> bool:
        """Write the records of an engine container, ending an operation with them; whether that was still right.

        Raises _ClaimConflict.
        """
        # What was seen is older than the records. A container is removed from the engine first and forgotten last, so
        # one that is still there was not deleted meanwhile.
        fresh = await self._engine.inspect(one.id)
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
            # Somebody was quicker; the next pass sees what they did.
            return False
        return True

    async def _rebuild_record(
        self, one: EngineContainer, view: ContainerView | None
    ) -> tuple[Container, list[StoreChange]]:
        labels = EngineContainerLabels.of(one)
        if one.spec is None:
            raise ValueError(f"{one.name} says nothing of its spec")
        known = [each.revision for each in await self._store.history(labels.uid)]
        entries = await self._entries(labels.uid)
        its_own = _last_entry_of(one, labels.revision, entries)
        if its_own is not None:
            number, spec = its_own.number, its_own.revision.spec
        else:
            number, spec = _latest_revision(one.spec, labels.revision, [*known, *(each.revision for each in entries)])
        given = placement_of(spec, one)
        # What does not run holds nothing, and takes what it needs when it is started.
        placement = given if one.running else Placement()
        head = view.container if view else _empty_container(one, labels, self._host_claims.node, entries)
        binding = EngineBinding(
            engine_id=one.id,
            engine_name=one.name,
            image_id=one.image_id,
            placement=given,
            fixed_digest=spec.fixed_digest,
            anonymous_volumes=anonymous_volumes(spec, one.volumes),
            layer_images=await self._layer_images(head, labels),
        )
        if its_own is not None and its_own.engine is not None:
            kept = its_own.engine
            binding = binding.model_copy(
                update={
                    "layer_images": kept.layer_images,
                    "base_image_id": kept.base_image_id,
                    "base_depth": kept.base_depth,
                }
            )
        container = head.changed(
            spec=spec,
            revision=number,
            generation=max(head.generation, number) + 1,
            update_time=now(),
            engine=binding,
        ).with_status(state=ContainerState.STOPPED, placement=placement, holds_resources=one.running, message="")
        container = container.changed(status=observed_status(container, one))
        changes: list[StoreChange] = [PutContainer(container, expect=view.version if view else 0)]
        if number not in {each.revision for each in known}:
            changes.append(PutRevision(its_own.revision if its_own else _revision(container, given, labels)))
        return container, [*changes, *await self._claims(container, head.status.placement)]

    async def _entries(self, uid: str) -> tuple[RevisionBackup, ...]:
        try:
            return await self._ledger.read(uid)
        except GpudockError as error:
            log.warning("the ledger was not read", uid=uid, detail=error.message)
            return ()

    async def _layer_images(self, head: Container, labels: EngineContainerLabels) -> tuple[str, ...]:
        before = head.engine.layer_images if head.engine else ()
        its_own = layer_image_name_of(labels.operation_id)
        if its_own in before or await self._engine.image(its_own) is None:
            return before
        return (*before, its_own)

    async def _claims(self, container: Container, before: Placement) -> list[StoreChange]:
        claims = self._host_claims
        table = await self._store.claims(claims.host)
        changes: list[StoreChange] = []
        wanted = claim_keys(container.status.placement)
        for key in wanted:
            found = table.holder(key)
            if found is not None and found.uid != container.uid:
                raise _ClaimConflict(key, found)
            changes += (claims.confirm if found else claims.claim)(container, [key])
        mine = dict.fromkeys((*claim_keys(before), *table.claims_of_container(container.uid)))
        return [*changes, *claims.release(container.uid, [key for key in mine if key not in wanted])]

    # -- operations that others have overtaken -----------------------------------------------------------------------

    async def end_overtaken_operations(
        self, seen: Mapping[str, EngineContainer], report_drift: ReportDrift
    ) -> frozenset[str]:
        """End operations whose work was done, or made moot, in a time that the store has been put back from.

        To drive one of these would stop and remove what runs. The ids of those that cannot be ended either, and must
        not be resumed.
        """
        left: set[str] = set()
        for stored in await self._store.unfinished(self._host_claims.node):
            operation = stored.value
            if operation.id in self._operations.driven or operation.target.kind is not ResourceKind.CONTAINER:
                continue
            try:
                view = await self._store.container(operation.target.name)
                if view is None or view.container.uid != operation.target.uid:
                    await self._end_without_target(operation.id, report_drift)
                elif not operation.committed and not await self._overtaken(stored, view, seen, report_drift):
                    left.add(operation.id)
            except RecordUnreadable:
                left.add(operation.id)
        return frozenset(left)

    async def _end_without_target(self, operation_id: str, report_drift: ReportDrift) -> None:
        """Its head was deleted in the store alone. What it made is judged like everything that no record binds."""
        stored = await self._store.operation(operation_id)
        if stored is None or stored.value.state.ended:
            return
        operation = stored.value
        failed = operation.changed(error=recorded_error(ContainerNotFound(container=operation.target.name)))
        ended, changes = Journal.close_record(failed, OperationState.FAILED, ())
        try:
            await self._store.apply([*changes, PutOperation(ended, expect=stored.version)])
        except StoreConflict:
            return
        report_drift(
            _overtaken_drift(
                operation,
                f"the store has no record of {operation.target.name}",
                DriftRemedy.REPAIRED,
                "operation ended",
            )
        )

    async def _overtaken(
        self,
        stored: Versioned[Operation],
        view: ContainerView,
        seen: Mapping[str, EngineContainer],
        report_drift: ReportDrift,
    ) -> bool:
        """Whether the operation was ended, or may be driven."""
        operation, engine = stored.value, view.container.engine
        if engine is not None and engine.engine_id in seen:
            return True
        candidates = [one async for one in self._newer(operation, view, seen)]
        if not candidates:
            return True
        if len(candidates) > 1:
            found = ", ".join(one.name for one in candidates)
            report_drift(
                _overtaken_drift(
                    operation,
                    f"several newer engine containers: {found}",
                    DriftRemedy.REPORTED,
                    "no automatic repair: remove all but one of them",
                )
            )
            return False
        (one,) = candidates
        labels = EngineContainerLabels.of(one)
        its_own = labels.operation_id == operation.id or operation.kind is OperationKind.CREATE
        try:
            ended = await self._write_record(one, view, stored if its_own else _with_overtaken_error(stored, labels))
        except _ClaimConflict as taken:
            held = f"{claim_text(taken.key)} is held by {taken.holder.container}"
            plan = f"no automatic repair while {held}: stop or delete the holder"
            report_drift(_overtaken_drift(operation, held, DriftRemedy.REPORTED, plan))
            return False
        if ended:
            why = f"engine container {one.name} is newer than the one that it changes"
            plan = f"operation ended; record restored at revision {labels.revision}"
            report_drift(_overtaken_drift(operation, why, DriftRemedy.REPAIRED, plan))
        return ended

    async def _newer(
        self, operation: Operation, view: ContainerView, seen: Mapping[str, EngineContainer]
    ) -> AsyncIterator[EngineContainer]:
        for one in created_by_gpudock(seen):
            labels = EngineContainerLabels.of(one)
            if labels.uid != operation.target.uid or one.spec is None or labels.revision <= view.container.revision:
                continue
            if labels.operation_id == operation.id:
                # A create that is driven again finds what it made. A successor was started after it had the files.
                if operation.kind is not OperationKind.CREATE and one.start_time is not None:
                    yield one
            elif await self._store.operation(labels.operation_id) is None:
                yield one

    # -- removing ----------------------------------------------------------------------------------------------------

    async def remove(self, orphans: Sequence[Orphan], report_drift: ReportDrift) -> None:
        """Remove those that are to be, once their grace is over; report those that no rule is certain about."""
        removable = {orphan.one.id: orphan for orphan in orphans if orphan.action is OrphanAction.REMOVED}
        moment = time.monotonic()
        self._orphans_since = {engine_id: self._orphans_since.get(engine_id, moment) for engine_id in removable}
        for orphan in orphans:
            if orphan.action is OrphanAction.REPORTED:
                report_drift(
                    _orphan_drift(orphan, DriftKind.CONTAINER_UNKNOWN, DriftRemedy.REPORTED, "nothing is done")
                )
        for engine_id, orphan in removable.items():
            left = self._grace - (moment - self._orphans_since[engine_id])
            if left > 0:
                report_drift(
                    _orphan_drift(
                        orphan,
                        DriftKind.CONTAINER_UNKNOWN,
                        DriftRemedy.PENDING,
                        f"it is removed by the first pass after its grace of {self._grace:g} s",
                    ).model_copy(update={"due_time": now() + timedelta(seconds=left)})
                )
            else:
                await self._remove(orphan, report_drift)

    async def _remove(self, orphan: Orphan, report_drift: ReportDrift) -> None:
        try:
            await self._engine_containers.remove(orphan.one.id, orphan.one.name)
        except EngineRejected as error:
            plan = f"it is removed as soon as the engine lets it be: {error.detail}"
            report_drift(_orphan_drift(orphan, DriftKind.CONTAINER_UNKNOWN, DriftRemedy.RETRIED, plan))
            return
        del self._orphans_since[orphan.one.id]
        report_drift(_orphan_drift(orphan, DriftKind.CONTAINER_UNKNOWN, DriftRemedy.REPAIRED, "it was removed"))


def _latest_revision(
    made_from: ContainerSpec, number: int, known: Sequence[ContainerRevision]
) -> tuple[int, ContainerSpec]:
    """The revision and spec of one that was made as `number`: what was changed in place since is in its history."""
    last = max(known, key=lambda one: one.revision, default=None)
    if last is None or last.revision <= number:
        return number, made_from
    return last.revision, last.spec if last.spec.fixed_digest == made_from.fixed_digest else made_from


def _last_entry_of(one: EngineContainer, number: int, entries: Sequence[RevisionBackup]) -> RevisionBackup | None:
    """The last revision that this engine container served: after the one it was made as, it was changed in place."""
    mine = [each for each in entries if each.engine is not None and each.engine.engine_id == one.id]
    last = max(mine, key=lambda each: each.number, default=None)
    if last is None or last.number < number or any(each.number > last.number for each in entries):
        return None
    return last


def _empty_container(
    one: EngineContainer, labels: EngineContainerLabels, node: str, entries: Sequence[RevisionBackup]
) -> Container:
    """A head as it was before it had anything."""
    if one.spec is None:
        raise ValueError(f"{one.name} says nothing of its spec")
    last = entries[-1] if entries else None
    return Container(
        name=labels.name,
        uid=labels.uid,
        node=node,
        owner=one.labels.get(LABEL_OWNER, ""),
        generation=0,
        revision=0,
        spec=one.spec,
        status=ContainerStatus(state=ContainerState.CREATING),
        create_time=(last.create_time if last else one.create_time) or now(),
        update_time=now(),
    )


def _revision(container: Container, given: Placement, labels: EngineContainerLabels) -> ContainerRevision:
    return ContainerRevision(
        container=container.name,
        uid=container.uid,
        revision=container.revision,
        spec=container.spec,
        cause=RevisionCause.ADOPTED,
        placement=given,
        image_id=container.engine.user_image_id if container.engine else "",
        create_time=now(),
        operation_id=labels.operation_id,
    )


def _with_overtaken_error(stored: Versioned[Operation], labels: EngineContainerLabels) -> Versioned[Operation]:
    error: GpudockError = OperationOvertaken(
        operation_id=stored.value.id, container=stored.value.target.name, revision=labels.revision
    )
    return Versioned(stored.value.changed(error=recorded_error(error)), stored.version)


def _end_changes(stored: Versioned[Operation], container: Container) -> list[StoreChange]:
    """What ends an operation: well, unless it has an error."""
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
    one, labels = orphan.one, orphan.labels
    return Drift(
        kind=kind,
        remedy=remedy,
        container=labels.name,
        uid=labels.uid,
        engine_id=one.id,
        engine_name=one.name,
        operation_id=labels.operation_id,
        claim=claim,
        other=other,
        actual=f"revision {labels.revision}, {one.state.value}",
        message=f"no record binds the engine container {one.name}: {orphan.why}",
        plan=plan,
    )


def _overtaken_drift(operation: Operation, why: str, remedy: DriftRemedy, plan: str) -> Drift:
    return Drift(
        kind=DriftKind.OPERATION_OVERTAKEN,
        remedy=remedy,
        container=operation.target.name,
        uid=operation.target.uid,
        operation_id=operation.id,
        message=f"operation {operation.id} on {operation.target.name} was overtaken: {why}",
        plan=plan,
    )
