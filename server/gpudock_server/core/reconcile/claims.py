"""Keeps claims and records in agreement: releases stale claims, and restores missing ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress

from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.core.reconcile.orphans import Orphan, OrphanAction
from gpudock_server.core.reconcile.records import ContainerRecords, claim_text, read_container_records
from gpudock_server.model.claims import UNREADABLE_HOLDER, ClaimKey, ClaimTable, Holder, claim_keys
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.store_changes import Claim, PutContainer, StoreChange
from gpudock_server.ports import ContainerView, Engine, Store, StoreConflict


class ClaimReconciler:
    """The rules for the claims of this node."""

    def __init__(self, store: Store, engine: Engine, claims: HostClaims) -> None:
        self._store = store
        self._engine = engine
        self._claims = claims

    async def release_stale(
        self, claims: ClaimTable, records: ContainerRecords, orphans: Sequence[Orphan], report_drift: ReportDrift
    ) -> None:
        """Release claims that no record has. `claims` must be read before `records`, so that each holder has a record.

        Claims that one of `orphans` uses are kept, and so are all claims of a container that may be adopted.
        """
        kept_uids = {
            orphan.labels.uid
            for orphan in orphans
            if orphan.action not in (OrphanAction.REMOVED, OrphanAction.REPORTED)
        }
        used: defaultdict[str, set[ClaimKey]] = defaultdict(set)
        for orphan in orphans:
            used[orphan.labels.uid].update(orphan.uses)
        by_uid = {view.container.uid: view for view in records.of(self._claims.node)}
        for key, holder in claims.claims.items():
            if holder == UNREADABLE_HOLDER:
                report_drift(self._unreadable_drift(key))
            if holder.node != self._claims.node or holder.container in records.unreadable_names:
                continue
            if key in used[holder.uid]:
                continue
            view = by_uid.get(holder.uid)
            if view is None and holder.uid not in kept_uids:
                await self._release(key, holder, [], "that container does not exist", report_drift)
            elif view is not None and not view.operation_id and key not in claim_keys(view.container.status.placement):
                # The unchanged record is written too, so that an operation that begins now causes a conflict.
                guard = [PutContainer(view.container, expect=view.version)]
                await self._release(key, holder, guard, "its record does not have it", report_drift)

    async def _release(
        self, key: ClaimKey, holder: Holder, guard: Sequence[StoreChange], reason: str, report_drift: ReportDrift
    ) -> None:
        try:
            await self._store.apply([*guard, *self._claims.release(holder.uid, [key])])
        except StoreConflict:
            return
        report_drift(
            Drift(
                kind=DriftKind.CLAIM_STALE,
                remedy=DriftRemedy.REPAIRED,
                container=holder.container,
                uid=holder.uid,
                claim=claim_text(key),
                message=f"stale claim of {holder.container or holder.uid} on {claim_text(key)}: {reason}",
                plan="claim released",
            )
        )

    async def restore_missing(self, records: ContainerRecords, report_drift: ReportDrift) -> None:
        """Restore the claims that a record has and the store lacks."""
        claims = await self._store.claims(self._claims.host)
        for view in records.of(self._claims.node):
            for key in _missing_claims(view, claims):
                view = await self._restore(view, key, report_drift)  # noqa: PLW2901 - each claim changes the version

    async def _restore(self, view: ContainerView, key: ClaimKey, report_drift: ReportDrift) -> ContainerView:
        container, store = view.container, self._store
        (again,) = self._claims.claim(container, [key])
        try:
            version = await store.apply([PutContainer(container, expect=view.version), again])
        except StoreConflict as conflict:
            other = conflict.found
            # A claim of this container is no conflict: it was made since, or the container is being changed.
            if isinstance(other, Holder) and other.uid != container.uid:
                report_drift(self._conflict_drift(view, key, other))
            return view
        report_drift(
            Drift(
                kind=DriftKind.CLAIM_MISSING,
                remedy=DriftRemedy.REPAIRED,
                container=container.name,
                uid=container.uid,
                claim=claim_text(key),
                message=f"missing claim of {container.name} on {claim_text(key)}",
                plan="claim restored",
            )
        )
        return ContainerView(container, version, view.operation_id)

    async def claim_for_orphans(self, orphans: Sequence[Orphan], report_drift: ReportDrift) -> None:
        """Claim the GPUs and ports that running orphans without a record use, so that no other container gets them.

        Each is claimed in a transaction of its own, since others may hold some of them.
        """
        running = [orphan for orphan in orphans if orphan.uses and orphan.action is not OrphanAction.LEFT]
        if not running:
            return
        records = await read_container_records(self._store)
        for orphan in running:
            view = records.views.get(orphan.labels.name)
            if orphan.engine_container.id in records.bound or (view is not None and view.operation_id):
                continue
            fresh = await self._engine.inspect(orphan.engine_container.id)
            if fresh is not None and fresh.running:
                await self._claim_for(orphan, report_drift)

    async def _claim_for(self, orphan: Orphan, report_drift: ReportDrift) -> None:
        labels, store, host = orphan.labels, self._store, self._claims.host
        holder = Holder(container=labels.name, uid=labels.uid, node=self._claims.node)
        claims = await store.claims(host)
        for key in orphan.uses:
            other = claims.holder(key)
            if other is None:
                with suppress(StoreConflict):
                    await store.apply([Claim(host, key, holder)])
            elif other.uid != labels.uid and orphan.action is OrphanAction.REPORTED:
                report_drift(self._double_use_drift(orphan, key, other))

    @staticmethod
    def _double_use_drift(orphan: Orphan, key: ClaimKey, other: Holder) -> Drift:
        engine_container, labels = orphan.engine_container, orphan.labels
        return Drift(
            kind=DriftKind.CLAIM_CONFLICT,
            remedy=DriftRemedy.REPORTED,
            container=labels.name,
            uid=labels.uid,
            engine_id=engine_container.id,
            engine_name=engine_container.name,
            claim=claim_text(key),
            other=other.container,
            expected=f"held by {labels.name}",
            actual=f"held by {other.container}",
            message=f"orphan {engine_container.name} uses {claim_text(key)}, which {other.container} has claimed",
            plan=f"no automatic repair: stop {engine_container.name}, or stop or delete {other.container}",
        )

    @staticmethod
    def _conflict_drift(view: ContainerView, key: ClaimKey, other: Holder) -> Drift:
        name = view.container.name
        return Drift(
            kind=DriftKind.CLAIM_CONFLICT,
            remedy=DriftRemedy.REPORTED,
            container=name,
            uid=view.container.uid,
            claim=claim_text(key),
            other=other.container,
            expected=f"held by {name}",
            actual=f"held by {other.container}",
            message=f"the record of {name} has {claim_text(key)}, which {other.container} has claimed",
            plan=f"no automatic repair: stop or delete {name} or {other.container}",
        )

    @staticmethod
    def _unreadable_drift(key: ClaimKey) -> Drift:
        return Drift(
            kind=DriftKind.RECORD_UNREADABLE,
            remedy=DriftRemedy.REPORTED,
            claim=claim_text(key),
            message=f"the claim on {claim_text(key)} is unreadable; it counts as held",
            plan="no automatic repair: delete its key; reconcile then restores the claim of the container that has it",
        )


def _missing_claims(view: ContainerView, claims: ClaimTable) -> Iterator[ClaimKey]:
    """The claims that a container without an operation has by its record, but not in `claims`."""
    container = view.container
    if view.operation_id or not container.status.holds_resources:
        return
    for key in claim_keys(container.status.placement):
        holder = claims.holder(key)
        if holder is None or holder.uid != container.uid:
            yield key
