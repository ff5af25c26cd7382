"""RollbackContainer: return a container to the spec and files of a revision, which creates a new revision.

GPUs and ports are allocated again, because other containers may hold those of the old revision.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpudock_server.core.containers.change_draft import ChangeDrafter
from gpudock_server.core.containers.change_plan import DesiredState, SuccessorFiles, SuccessorSource
from gpudock_server.core.containers.commands import Rollback
from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.resource import UNPAUSED_STATES, ContainerResource, require_state
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.errors import ImageDiffers, ImageNotFound, SnapshotNotFound
from gpudock_server.model.container import RUNNING_STATES, Container, ContainerRevision, ContainerState
from gpudock_server.model.operation import OperationKind
from gpudock_server.ports import Engine, RevisionView


@dataclass(frozen=True, slots=True)
class RollbackContainer:
    """Drafts a rollback, and decides where the files come from."""

    containers: ContainerResource
    engine: Engine
    history: History
    changes: ChangeDrafter

    async def draft(self, command: Rollback) -> OperationDraft:
        """Draft a rollback to a revision's spec, with its files or the current ones. FAILED containers are restored."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container, state = view.container, view.container.status.state
        needs = "to roll it back, it must be RUNNING, STOPPED, EXITED or FAILED"
        require_state(container, UNPAUSED_STATES | {ContainerState.FAILED}, needs)
        gone = state is ContainerState.FAILED and await self.history.is_gone(container)
        found = await self.history.find_revision(container, command.revision)
        desired = DesiredState(
            OperationKind.ROLLBACK,
            found.revision.spec,
            runs=state in RUNNING_STATES,
            snapshots=command.snapshots,
            source=await self._source(container, found, command, gone=gone),
        )
        return await self.changes.draft(view, desired)

    async def _source(
        self, container: Container, found: RevisionView, command: Rollback, *, gone: bool
    ) -> SuccessorSource:
        if command.spec_only and gone:
            return await self._fresh(container, found.revision)
        if command.revision == container.revision and not gone:
            # A rollback to the current revision keeps the current files.
            return SuccessorSource()
        if command.spec_only:
            _require_same_image(container, found.revision)
            return SuccessorSource()
        snapshot = found.snapshot
        if snapshot is None:
            raise SnapshotNotFound(container=container.name, revision=command.revision)
        warnings = await self._pull_warnings(found.revision, snapshot.image_id)
        return SuccessorSource(
            files=SuccessorFiles.RESTORE,
            image_id=snapshot.image_id,
            base_image_id=found.revision.image_id,
            revision=command.revision,
            snapshot=snapshot,
            bytes_to_move=snapshot.layer_bytes,
            fetch=bool(warnings),
            warnings=warnings,
        )

    async def _fresh(self, container: Container, revision: ContainerRevision) -> SuccessorSource:
        """The files of the image, if those of the container are lost."""
        warnings = await self._pull_warnings(revision, revision.image_id)
        lost = f"the files of {container.name} are lost; it starts with the files of image {revision.spec.image}"
        return SuccessorSource(
            files=SuccessorFiles.FRESH,
            image_id=revision.image_id,
            base_image_id=revision.image_id,
            fetch=bool(warnings),
            warnings=(lost, *warnings),
        )

    async def _pull_warnings(self, revision: ContainerRevision, image_id: str) -> tuple[str, ...]:
        """A warning if the image has to be pulled again; empty if the engine has it. Raises ImageNotFound."""
        if await self.engine.image(image_id) is not None:
            return ()
        image = revision.spec.image
        if image_id != revision.image_id:
            # The engine's commit created this image, so no registry has it.
            raise ImageNotFound(image=f"{image} ({image_id})")
        return (f"image {image} ({image_id}) is not in the engine and will be pulled",)


def _require_same_image(container: Container, revision: ContainerRevision) -> None:
    current = container.engine.user_image_id if container.engine else ""
    if revision.image_id != current:
        raise ImageDiffers(
            container=container.name,
            image=revision.spec.image,
            image_id=revision.image_id,
            current_image_id=current,
        )
