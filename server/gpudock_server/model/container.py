"""A container: its spec, its status, its history, and the engine container that runs it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from gpudock_server.model.record import Record
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.spec import ContainerSpec, PortRequest, Protocol


class ContainerState(StrEnum):
    """The lifecycle state of a container.

    EXITED: its process ended by itself; it keeps its claims. RESTARTING: its process ended, and the engine is about to
    start it again, or has just done so, according to its restart policy. STOPPED: a user stopped it. FAILED: its engine
    container was removed, and not by gpudock.
    """

    CREATING = "CREATING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    EXITED = "EXITED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    DELETING = "DELETING"
    RESTARTING = "RESTARTING"


# States in which the engine runs a process, or will start one by itself.
RUNNING_STATES = frozenset({ContainerState.RUNNING, ContainerState.RESTARTING})
# RUNNING_STATES and frozen processes: containers that must be stopped before they are replaced.
ACTIVE_STATES = RUNNING_STATES | {ContainerState.PAUSED}
STOPPED_STATES = frozenset({ContainerState.STOPPED, ContainerState.EXITED})


class PortBinding(Record):
    """A published port with the host port that was assigned."""

    container_port: int
    protocol: Protocol = Protocol.TCP
    host_port: int

    def serves(self, request: PortRequest) -> bool:
        """Whether this binding satisfies `request`."""
        return (
            self.container_port == request.container_port
            and self.protocol == request.protocol
            and request.host_port in (0, self.host_port)
        )


class Placement(Record):
    """The GPUs and ports of the host that a container holds, in the order in which the container sees them."""

    gpu_uuids: tuple[str, ...] = ()
    ports: tuple[PortBinding, ...] = ()

    def serves(self, spec: ContainerSpec) -> bool:
        """Whether the number of GPUs and the ports are those that `spec` requests."""
        if (len(self.gpu_uuids), len(self.ports)) != (spec.gpus.size, len(spec.ports)):
            return False
        return all(any(binding.serves(request) for binding in self.ports) for request in spec.ports)


class EngineBinding(Record):
    """The engine container that runs a container, and what it was created from.

    `image_id` is the image of the engine container. After a layer transfer by commit it is no longer the image that the
    user named; the id of that one is `base_image_id`. A successor is created from these ids and not from the tag, which
    may have moved. `anonymous_volumes` (target -> engine volume) come from the VOLUME lines of the image: they hold the
    user's files, are passed on to every replacement, and are removed only with the container. `layer_images` are the
    names of the images that layer transfers by commit created, oldest first. `base_depth` is the number of lower layers
    that belong to the user's image; 0 until a layer transfer by commit has counted them.
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
        """Return the id of the image that the user named."""
        return self.base_image_id or self.image_id

    def matches(self, spec: ContainerSpec, placement: Placement) -> bool:
        """Whether this engine container can run `spec` with `placement`; otherwise a new one is needed."""
        return self.placement == placement and self.fixed_digest == spec.fixed_digest


class ContainerStatus(Record):
    """The observed status. `placement` is what the container holds now; it is empty after the release."""

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
    """The current record (head) of a container.

    `generation` counts the changes by users. Observed changes of the status do not change it, so that an etag does not
    become stale because a process ended.
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
        """Return the reference that operations use for their target."""
        return ResourceRef(kind=ResourceKind.CONTAINER, name=self.name, uid=self.uid)

    @property
    def etag(self) -> str:
        """Return the etag of this generation; opaque to callers."""
        return f"{self.uid[:8]}.{self.generation}"

    def changed(self, **changes: object) -> Container:
        """Return a copy with some fields replaced."""
        return self.model_copy(update=changes)

    def with_status(self, **changes: object) -> Container:
        """Return a copy with some fields of the status replaced."""
        return self.changed(status=self.status.model_copy(update=changes))


class RevisionCause(StrEnum):
    """What created a revision. ADOPTED: its record was lost and was rebuilt from the engine container."""

    CREATED = "CREATED"
    SCALED = "SCALED"
    UPDATED = "UPDATED"
    ROLLED_BACK = "ROLLED_BACK"
    RESTARTED = "RESTARTED"
    CLONED = "CLONED"
    ADOPTED = "ADOPTED"


class ContainerRevision(Record):
    """One immutable revision in the history of a container. `image_id` is the image that the user named."""

    container: str
    uid: str
    revision: int
    spec: ContainerSpec
    cause: RevisionCause
    placement: Placement
    image_id: str = ""
    create_time: datetime
    operation_id: str
