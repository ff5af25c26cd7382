"""Reads containers and begins operations on them.

`commands` has one command for each operation. The module of the same name (`lifecycle` for start, restart and scale)
checks the command and drafts the operation, whose saga then carries it out.
"""

from __future__ import annotations

from functools import partial

from gpudock_server.core.containers.change_draft import ChangeDrafter
from gpudock_server.core.containers.change_saga import ChangeSaga, ContainerChanges
from gpudock_server.core.containers.clone import CloneContainer, CloneSaga
from gpudock_server.core.containers.commands import (
    Clone,
    Command,
    Commit,
    Create,
    Delete,
    DeleteRevision,
    Pause,
    Restart,
    Rollback,
    Scale,
    Start,
    Stop,
    Unpause,
    Update,
)
from gpudock_server.core.containers.commit import CommitContainer, CommitSaga
from gpudock_server.core.containers.create import CreateContainer, CreateSaga
from gpudock_server.core.containers.delete import DeleteContainer, DeleteSaga
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.history import DeleteContainerRevision, DeleteRevisionSaga, History
from gpudock_server.core.containers.images import Images
from gpudock_server.core.containers.layer_images import LayerImages
from gpudock_server.core.containers.lifecycle import Lifecycle
from gpudock_server.core.containers.mounts import Mounts
from gpudock_server.core.containers.new_container import NewContainers
from gpudock_server.core.containers.pause import PauseContainer, PauseSaga
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.rollback import RollbackContainer
from gpudock_server.core.containers.snapshots import RevisionSnapshots
from gpudock_server.core.containers.stop import StopContainer, StopSaga
from gpudock_server.core.containers.update import UpdateContainer
from gpudock_server.core.operations.commands import Commands, Drafter
from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.operations.saga import SagaBuilder
from gpudock_server.core.placement.allocator import Allocator
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.model.container import Container
from gpudock_server.model.engine import HostCapacity, NodeLimits
from gpudock_server.model.operation import OperationKind
from gpudock_server.ports import (
    ContainerView,
    Engine,
    LayerStore,
    Page,
    RevisionBackupStore,
    RevisionView,
    SnapshotStore,
    Store,
)

_CHANGES = (
    OperationKind.START,
    OperationKind.RESTART,
    OperationKind.SCALE,
    OperationKind.UPDATE,
    OperationKind.ROLLBACK,
)


class ContainerUseCases:
    """The use cases of containers: each drafts an operation, which a saga carries out."""

    def __init__(
        self,
        *,
        engine: Engine,
        layers: LayerStore,
        revision_files: SnapshotStore,
        revision_backups: RevisionBackupStore,
        containers: ContainerResource,
        engine_containers: EngineContainers,
        mounts: Mounts,
        images: Images,
        history: History,
        allocator: Allocator,
        claims: HostClaims,
        limits: NodeLimits,
    ) -> None:
        """Give each use case the ports and services that it uses."""
        layer_images = LayerImages(engine, layers)
        snapshots = RevisionSnapshots(revision_files, engine, engine_containers, history.defaults.snapshots)
        self._changes = ContainerChanges(
            containers=containers,
            engine=engine,
            engine_containers=engine_containers,
            mounts=mounts,
            images=images,
            layers=layers,
            layer_images=layer_images,
            snapshots=snapshots,
            history=history,
            claims=claims,
        )
        changes = ChangeDrafter(self._changes, allocator, limits)
        self.lifecycle = Lifecycle(containers, history, changes)
        self.update = UpdateContainer(containers, history, images, changes)
        self._rollback = RollbackContainer(containers, engine, history, changes)
        new = NewContainers(
            containers=containers,
            engine_containers=engine_containers,
            mounts=mounts,
            allocator=allocator,
            claims=claims,
            revision_backups=revision_backups,
            limits=limits,
        )
        self._create = CreateContainer(new, engine, images)
        self._clone = CloneContainer(
            new=new,
            engine=engine,
            images=images,
            layers=layers,
            layer_images=layer_images,
            snapshots=revision_files,
            history=history,
        )
        self._delete_revision = DeleteContainerRevision(containers, history)
        self.stop = StopContainer(containers, engine, engine_containers, snapshots, history, claims)
        self._pause = PauseContainer(containers, engine, engine_containers)
        self._delete = DeleteContainer(containers, engine, engine_containers, history, claims)
        self._commit = CommitContainer(containers, engine, engine_containers, images, layers, revision_files)

    @property
    def saga_builders(self) -> dict[OperationKind, SagaBuilder]:
        """Builders of the sagas of recorded operations, by kind."""
        return {
            OperationKind.CREATE: partial(CreateSaga, self._create),
            **dict.fromkeys(_CHANGES, partial(ChangeSaga, self._changes)),
            OperationKind.CLONE: partial(CloneSaga, self._clone),
            OperationKind.DELETE_REVISION: partial(DeleteRevisionSaga, self._delete_revision),
            OperationKind.STOP: partial(StopSaga, self.stop),
            OperationKind.PAUSE: partial(PauseSaga, self._pause),
            OperationKind.UNPAUSE: partial(PauseSaga, self._pause),
            OperationKind.DELETE: partial(DeleteSaga, self._delete),
            OperationKind.COMMIT: partial(CommitSaga, self._commit),
        }

    @property
    def drafters(self) -> dict[type, Drafter]:
        """Drafters of operations, by type of command."""
        return {
            Create: self._create.draft,
            Start: self.lifecycle.draft_start,
            Restart: self.lifecycle.draft_restart,
            Scale: self.lifecycle.draft_scale,
            Update: self.update.draft,
            Rollback: self._rollback.draft,
            Clone: self._clone.draft,
            DeleteRevision: self._delete_revision.draft,
            Stop: self.stop.draft,
            Pause: self._pause.draft,
            Unpause: self._pause.draft,
            Delete: self._delete.draft,
            Commit: self._commit.draft,
        }


class Containers(Commands):
    """Reads containers, and begins operations on them."""

    def __init__(
        self,
        use_cases: ContainerUseCases,
        operations: Operations,
        *,
        store: Store,
        containers: ContainerResource,
        history: History,
        host: HostCapacity,
    ) -> None:
        """`operations` must have been built with the saga builders of `use_cases`.

        `host`: the maximum resources that a container can have.
        """
        super().__init__(operations, use_cases.drafters)
        self._store = store
        self._containers = containers
        self._history = history
        self.host = host

    async def get(self, name: str) -> ContainerView:
        """A container of any node. Raises ContainerNotFound."""
        return await self._containers.get(name)

    async def list(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        """List the containers of all nodes by name. Raises ResumeTokenExpired."""
        return await self._store.containers(page_size=page_size, page_token=page_token)

    async def revision(self, name: str, number: int) -> tuple[Container, RevisionView]:
        """A container and one of its revisions, 0 for the current one. Raises ContainerNotFound, RevisionNotFound."""
        container = (await self.get(name)).container
        return container, await self._history.find_revision(container, number or container.revision)

    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        """A container's history, oldest first. Raises ResumeTokenExpired."""
        return await self._store.revisions(uid, page_size=page_size, page_token=page_token)

    async def run(self, command: Command, request: RequestKey | None) -> Container:
        """Begin an operation, wait for its end, and return the resulting container."""
        result = await self._run(command, request)
        if not isinstance(result, Container):
            raise TypeError(f"{type(command).__name__} has no container as its result")
        return result
