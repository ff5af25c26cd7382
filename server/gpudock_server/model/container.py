"""A container: what was asked for, what is, and which engine container serves it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from gpudock_server.model.record import Record
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.spec import ContainerSpec, PortRequest, Protocol


class ContainerState(StrEnum):
    """Where a container is in its life.

    EXITED: its process ended by itself, its claims are kept. RESTARTING: the same, and the engine is about to start it
    again, or has just done so, as its restart policy says. STOPPED: a user stopped it. FAILED: its engine container is
    gone without our doing.
    """

    CREATING = "CREATING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    EXITED = "EXITED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    DELETING = "DELETING"
    RESTARTING = "RESTARTING"


# States in which the engine sees to it that a process runs, now or in a moment.
RUNNING_STATES = frozenset({ContainerState.RUNNING, ContainerState.RESTARTING})
# The same, and those whose processes are frozen: what has to be stopped before anything of it may be replaced.
ACTIVE_STATES = RUNNING_STATES | {ContainerState.PAUSED}
STOPPED_STATES = frozenset({ContainerState.STOPPED, ContainerState.EXITED})


class PortBinding(Record):
    """A published port as it was assigned."""

    container_port: int
    protocol: Protocol = Protocol.TCP
    host_port: int

    def serves(self, request: PortRequest) -> bool:
        """Whether this binding is what `request` asks for."""
        return (
            self.container_port == request.container_port
            and self.protocol == request.protocol
            and request.host_port in (0, self.host_port)
        )


class Placement(Record):
    """What a container holds of its host: cards and ports, in the order that the container sees them."""

    gpu_uuids: tuple[str, ...] = ()
    ports: tuple[PortBinding, ...] = ()

    def serves(self, spec: ContainerSpec) -> bool:
        """Whether this is as many cards as `spec` asks for, and its ports."""
        if (len(self.gpu_uuids), len(self.ports)) != (spec.gpus.size, len(spec.ports)):
            return False
        return all(any(binding.serves(request) for binding in self.ports) for request in spec.ports)


class EngineBinding(Record):
    """The engine container that serves a container, and what it was made with.

    `image_id` is what it runs on, which after a carry by commit is no longer the image that the user named: that one's
    id is `base_image_id`. A successor is made from these ids and not from the tag, which may have moved.
    `anonymous_volumes` (target -> engine volume) came from the image's VOLUME lines: they hold the user's files, move
    along with every replacement, and are removed only with the container. `layer_images` are the images that carries
    by commit made, by name, oldest first; `base_depth` is how many of the layers below are those of the user's image,
    0 until a carry by commit has counted them.
    """

    engine_id: str
    engine_name: str
    image_id: str
    placement: Placement
    fixed_digest: str
    anonymous_volumes: dict[str, str] = Field(default_factory=dict)
    layer_images: tuple[str, ...] = ()
    base_image_id: str = ""
    base_depth: int = 0

    @property
    def user_image_id(self) -> str:
        """The id of the image that the user named."""
        return self.base_image_id or self.image_id

    def matches(self, spec: ContainerSpec, placement: Placement) -> bool:
        """Whether this engine container can serve `spec` with `placement`, or a new one is needed."""
        return self.placement == placement and self.fixed_digest == spec.fixed_digest


class ContainerStatus(Record):
    """What was observed. `placement` is what the container holds now: empty once it has been released."""

    state: ContainerState
    placement: Placement = Placement()
    holds_resources: bool = False
    exit_code: int | None = None
    oom_killed: bool = False
    health: str = ""
    message: str = ""
    restart_count: int = 0
    start_time: datetime | None = None
    finish_time: datetime | None = None


class Container(Record):
    """The head of a container's history.

    `generation` counts the changes that users made; observed changes of status leave it alone, so that an etag does
    not go stale because a process ended.
    """

    name: str
    uid: str
    node: str
    owner: str
    generation: int
    revision: int
    spec: ContainerSpec
    status: ContainerStatus
    engine: EngineBinding | None = None
    create_time: datetime
    update_time: datetime

    @property
    def target(self) -> ResourceRef:
        """Names it as what an operation works on."""
        return ResourceRef(kind=ResourceKind.CONTAINER, name=self.name, uid=self.uid)

    @property
    def etag(self) -> str:
        """Names this state of the user's intent; opaque to callers."""
        return f"{self.uid[:8]}.{self.generation}"

    def changed(self, **changes: object) -> Container:
        """A copy with some fields replaced."""
        return self.model_copy(update=changes)

    def with_status(self, **changes: object) -> Container:
        """A copy with some fields of its status replaced."""
        return self.changed(status=self.status.model_copy(update=changes))


class RevisionCause(StrEnum):
    """What made a revision. ADOPTED: its record was lost, and written again from what the engine has."""

    CREATED = "CREATED"
    SCALED = "SCALED"
    UPDATED = "UPDATED"
    ROLLED_BACK = "ROLLED_BACK"
    RESTARTED = "RESTARTED"
    CLONED = "CLONED"
    ADOPTED = "ADOPTED"


class ContainerRevision(Record):
    """One immutable step of a container's history. `image_id` is that of the image that the user named."""

    container: str
    uid: str
    revision: int
    spec: ContainerSpec
    cause: RevisionCause
    placement: Placement
    image_id: str = ""
    create_time: datetime
    operation_id: str
