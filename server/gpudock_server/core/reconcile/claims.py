"""Claims against records: what nobody has is released, and what somebody lacks is claimed again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from gpudock_server.core.containers.world import World
from gpudock_server.core.reconcile.book import Note
from gpudock_server.core.reconcile.scene import Heads, claim_text
from gpudock_server.model.changes import Change, Claim, PutContainer, Release
from gpudock_server.model.claims import UNREADABLE, ClaimKey, ClaimTable, Holder, keys_of
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.ports import ContainerView, StoreConflict


class ClaimRules:
    """The rules for claims of this node."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def release_stale(self, claims: ClaimTable, heads: Heads, spared: Collection[str], note: Note) -> None:
        """Release what no record has. `claims` were read before `heads`, so whoever holds one has a head by then.

        `spared` are uids of containers that have no head and may be given one.
        """
        by_uid = {view.container.uid: view for view in heads.of(self._world.node)}
        for key, holder in claims.claims.items():
            if holder == UNREADABLE:
                note(self._unreadable(key))
            if holder.node != self._world.node or holder.container in heads.unreadable_names:
                continue
            view = by_uid.get(holder.uid)
            if view is None and holder.uid not in spared:
                await self._release(key, holder, [], f"{holder.container or holder.uid} does not exist", note)
            elif view is not None and not view.operation_id and key not in keys_of(view.container.status.placement):
                # The head is put as it is, so that an operation that begins just now is met.
                guard = [PutContainer(view.container, expect=view.version)]
                await self._release(key, holder, guard, f"{holder.container} does not have it", note)

    async def _release(self, key: ClaimKey, holder: Holder, guard: Sequence[Change], why: str, note: Note) -> None:
        try:
            await self._world.store.apply([*guard, Release(self._world.host, key, holder.uid)])
        except StoreConflict:
            return
        note(
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

    async def restore_missing(self, heads: Heads, note: Note) -> None:
        """Claim again what a record has and the claims do not."""
        claims = await self._world.store.claims(self._world.host)
        for view in heads.of(self._world.node):
            for key in _lacking(view, claims):
                view = await self._restore(view, key, note)  # noqa: PLW2901 - its version moves with every claim

    async def _restore(self, view: ContainerView, key: ClaimKey, note: Note) -> ContainerView:
        container, store = view.container, self._world.store
        again = Claim(self._world.host, key, self._world.holder(container))
        try:
            version = await store.apply([PutContainer(container, expect=view.version), again])
        except StoreConflict as conflict:
            other = conflict.found
            # Its own: claims were read after the record, and it has been claimed or is being changed since.
            if isinstance(other, Holder) and other.uid != container.uid:
                note(self._conflict(view, key, other))
            return view
        note(
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

    @staticmethod
    def _conflict(view: ContainerView, key: ClaimKey, other: Holder) -> Drift:
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
    def _unreadable(key: ClaimKey) -> Drift:
        return Drift(
            kind=DriftKind.RECORD_UNREADABLE,
            remedy=DriftRemedy.REPORTED,
            claim=claim_text(key),
            message=f"the claim on {claim_text(key)} cannot be read; it counts as held",
            plan="nothing: delete its key; whoever has it then claims it again",
        )


def _lacking(view: ContainerView, claims: ClaimTable) -> Iterator[ClaimKey]:
    """What a container with no operation at work should hold, and by `claims` does not."""
    container = view.container
    if view.operation_id or not container.status.holds_resources:
        return
    for key in keys_of(container.status.placement):
        holder = claims.holder(key)
        if holder is None or holder.uid != container.uid:
            yield key
