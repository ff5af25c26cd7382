"""Claims against records: what nobody has is released, and what somebody lacks is claimed again."""

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
    """The rules for claims of this node."""

    def __init__(self, store: Store, engine: Engine, claims: HostClaims) -> None:
        self._store = store
        self._engine = engine
        self._claims = claims

    async def release_stale(
        self, claims: ClaimTable, records: ContainerRecords, orphans: Sequence[Orphan], report_drift: ReportDrift
    ) -> None:
        """Release what no record has. `claims` were read before `records`, so whoever holds one has a head by then.

        `orphans` are the engine containers that no record binds. What one of them uses stays claimed; so does all that
        is claimed for a container that has no head and may be given one.
        """
        spared = {
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
            if view is None and holder.uid not in spared:
                await self._release(key, holder, [], f"{holder.container or holder.uid} does not exist", report_drift)
            elif view is not None and not view.operation_id and key not in claim_keys(view.container.status.placement):
                # The head is put as it is, so that an operation that begins just now is met.
                guard = [PutContainer(view.container, expect=view.version)]
                await self._release(key, holder, guard, f"{holder.container} does not have it", report_drift)

    async def _release(
        self, key: ClaimKey, holder: Holder, guard: Sequence[StoreChange], why: str, report_drift: ReportDrift
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
                message=f"{claim_text(key)} was claimed for {holder.container}, and {why}",
                plan="the claim was released",
            )
        )

    async def restore_missing(self, records: ContainerRecords, report_drift: ReportDrift) -> None:
        """Claim again what a record has and the claims do not."""
        claims = await self._store.claims(self._claims.host)
        for view in records.of(self._claims.node):
            for key in _missing_claims(view, claims):
                view = await self._restore(view, key, report_drift)  # noqa: PLW2901 - its version moves with every claim

    async def _restore(self, view: ContainerView, key: ClaimKey, report_drift: ReportDrift) -> ContainerView:
        container, store = view.container, self._store
        (again,) = self._claims.claim(container, [key])
        try:
            version = await store.apply([PutContainer(container, expect=view.version), again])
        except StoreConflict as conflict:
            other = conflict.found
            # Its own: claims were read after the record, and it has been claimed or is being changed since.
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
                message=f"{container.name} has {claim_text(key)}, which was not claimed for it",
                plan="it was claimed again",
            )
        )
        return ContainerView(container, version, view.operation_id)

    async def claim_for_orphans(self, orphans: Sequence[Orphan], report_drift: ReportDrift) -> None:
        """Claim what an engine container uses that runs and has not been given a record: nobody else may have it.

        Each card and port alone, since others may hold some of them.
        """
        running = [orphan for orphan in orphans if orphan.uses and orphan.action is not OrphanAction.LEFT]
        if not running:
            return
        records = await read_container_records(self._store)
        for orphan in running:
            view = records.views.get(orphan.labels.name)
            if orphan.one.id in records.bound or (view is not None and view.operation_id):
                continue
            fresh = await self._engine.inspect(orphan.one.id)
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
        one, labels = orphan.one, orphan.labels
        return Drift(
            kind=DriftKind.CLAIM_CONFLICT,
            remedy=DriftRemedy.REPORTED,
            container=labels.name,
            uid=labels.uid,
            engine_id=one.id,
            engine_name=one.name,
            claim=claim_text(key),
            other=other.container,
            expected=f"held by {labels.name}",
            actual=f"held by {other.container}",
            message=(
                f"the engine container {one.name}, which no record binds, runs with {claim_text(key)}, and that is"
                f" claimed for {other.container}"
            ),
            plan=f"nothing: stop {one.name}, or stop or delete {other.container}",
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
            message=f"{name} has {claim_text(key)} by its record, and it is claimed for {other.container}",
            plan=f"nothing: stop or delete {name} or {other.container}",
        )

    @staticmethod
    def _unreadable_drift(key: ClaimKey) -> Drift:
        return Drift(
            kind=DriftKind.RECORD_UNREADABLE,
            remedy=DriftRemedy.REPORTED,
            claim=claim_text(key),
            message=f"the claim on {claim_text(key)} cannot be read; it counts as held",
            plan="nothing: delete its key; whoever has it then claims it again",
        )


def _missing_claims(view: ContainerView, claims: ClaimTable) -> Iterator[ClaimKey]:
    """What a container with no operation at work should hold, and by `claims` does not."""
    container = view.container
    if view.operation_id or not container.status.holds_resources:
        return
    for key in claim_keys(container.status.placement):
        holder = claims.holder(key)
        if holder is None or holder.uid != container.uid:
            yield key
