"""What core needs of the world: an engine, a store, cards, and a way to carry a writable layer.

Adapters implement these; core speaks nothing else. Every method may raise the errors named in its protocol's
docstring, and no others that a caller should see. Every call is bounded in time by its adapter.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from gpudock_server.model.changes import Change, Lock
from gpudock_server.model.claims import ClaimTable
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.engine import (
    Blueprint,
    EngineContainer,
    EngineEvent,
    EngineImage,
    EngineInfo,
    EngineVolume,
    ExecRequest,
    ExecStatus,
    ExecStream,
    RegistryAuth,
)
from gpudock_server.model.gpu import GpuSnapshot
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import CarryMethod, Operation, RequestRecord
from gpudock_server.model.record import Record
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotMethod
from gpudock_server.model.spec import RestartPolicy
from gpudock_server.model.volume import (
    PoolUsage,
    TreeSummary,
    Volume,
    VolumeBackendKind,
    VolumeBacking,
    VolumeRevision,
    VolumeUsage,
)

T = TypeVar("T")

# Called with (current, total) bytes; total 0 is "not known yet".
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """A stored value with the version to compare and set against; 0 never names an existing one."""

    value: T
    version: int


@dataclass(frozen=True, slots=True)
class ContainerView:
    """A head together with the operation that has it locked (empty: none), read at one moment."""

    container: Container
    version: int
    operation_id: str


@dataclass(frozen=True, slots=True)
class RevisionView:
    """A revision and its snapshot, read at one moment; None: its files were not kept."""

    revision: ContainerRevision
    snapshot: Snapshot | None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Something in the store that cannot be read: where it is, whose it is by its key, and what is wrong with it."""

    key: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class VolumeView:
    """A volume's head together with the operation that has it locked (empty: none), read at one moment."""

    volume: Volume
    version: int
    operation_id: str


@dataclass(frozen=True, slots=True)
class VolumeSeen:
    """A volume with what is derived: who mounts it, and the bytes in use where they were measured."""

    view: VolumeView
    containers: tuple[str, ...]
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a consistent listing. `next_token` is empty on the last.

    With `watch_token` a watch tells what happened since, where the listed can be watched. What cannot be read is left
    out of `items`.
    """

    items: tuple[T, ...]
    next_token: str
    watch_token: str = ""
    unreadable: tuple[Unreadable, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen(Generic[T]):
    """What a watch saw of one object: as it was before a change (None: not there) and after it (None: gone).

    Both are None where nothing is to be told up to here. `token` goes on behind it. `list_complete`: everything that
    was there when the watch began has been shown.
    """

    before: T | None
    after: T | None
    token: str
    list_complete: bool = False


class StoreConflict(Exception):
    """A condition of a transaction did not hold, so none of it happened.

    `change` is the first whose condition failed; `found` is what stands there: an operation id for a lock, a Holder
    for a claim, a Versioned record otherwise, None where nothing does.
    """

    def __init__(self, change: Change, found: object) -> None:
        super().__init__(f"{change} met {found}")
        self.change = change
        self.found = found


class Store(Protocol):
    """The truth. Raises StoreUnavailable when it does not answer within its timeout.

    `apply` resolves what a timeout leaves open: while it has time it finds out, by reading back, whether the
    transaction happened, and only then gives up with StoreUnavailable. What cannot be read is left out of what is read
    with others, and RecordUnreadable where it was asked for by itself; a claim that cannot be read is held.
    """

    async def apply(self, changes: Sequence[Change]) -> int:
        """Do all of `changes` or none; the version that the things put now have. Raises StoreConflict."""
        ...

    async def container(self, name: str) -> ContainerView | None:
        """A head and its lock, in one read."""
        ...

    async def containers(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        """Heads in the order of their names; every page shows the moment of the first. Raises ResumeTokenExpired."""
        ...

    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        """A container's history, oldest first; pages as in `containers`."""
        ...

    async def history(self, uid: str) -> tuple[RevisionView, ...]:
        """All of a container's history at one moment, oldest first."""
        ...

    async def revision(self, uid: str, number: int) -> RevisionView | None:
        """One revision with its snapshot."""
        ...

    def watch_containers(self, *, token: str, listing: bool) -> AsyncGenerator[Seen[ContainerView], None]:
        """Heads and their locks as they change, every change once and in order: behind `token`, or from now on.

        Without a token and with `listing` those that are there come first, then `list_complete`. With a token, the
        first is one that only says that the watch has begun. Something comes at least every idle interval of the
        store. Not asking for the next one holds the store back. Raises ResumeTokenExpired, InvalidArgument
        (resume_token), StoreUnavailable when the store is away for longer than its timeout.
        """
        ...

    async def volume(self, name: str) -> VolumeView | None:
        """A volume's head and its lock, in one read."""
        ...

    async def volumes(self, *, page_size: int, page_token: str) -> Page[VolumeView]:
        """Volumes' heads in the order of their names; pages as in `containers`."""
        ...

    def watch_volumes(self, *, token: str, listing: bool) -> AsyncGenerator[Seen[VolumeSeen], None]:
        """Heads, their locks and the containers whose specs mount them, as they change; like `watch_containers`.

        What is in use is not among it.
        """
        ...

    async def volume_revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        """A volume's history, oldest first; pages as in `containers`."""
        ...

    async def claims(self, host: str) -> ClaimTable:
        """All claims of a host, at one moment."""
        ...

    async def operation(self, operation_id: str) -> Versioned[Operation] | None:
        """An operation that has not expired."""
        ...

    async def operations(self, *, page_size: int, page_token: str) -> Page[Operation]:
        """Operations in the order of their ids; pages as in `containers`."""
        ...

    async def unfinished(self, node: str) -> tuple[Versioned[Operation], ...]:
        """Operations of `node` that have not ended and can be read, found by the locks they hold."""
        ...

    async def held_locks(self) -> tuple[Lock, ...]:
        """Every lock there is, of any node."""
        ...

    async def request(self, request_id: str) -> RequestRecord | None:
        """What a request id stood for."""
        ...

    async def nodes(self) -> tuple[NodeRecord, ...]:
        """Every daemon that is alive."""
        ...

    async def ping(self) -> str:
        """The store's version; raises StoreUnavailable."""
        ...


class ExecSession(Protocol):
    """A process inside a container, with its streams. Raises EngineUnavailable, EngineRejected."""

    def read(self) -> AsyncIterator[tuple[ExecStream, bytes]]:
        """Output as it comes; ends when the process has closed its side. Not reading holds the process back."""
        ...

    async def write(self, data: bytes) -> None:
        """Give `data` to its stdin; returns when the engine has taken it."""
        ...

    async def close_stdin(self) -> None:
        """End its stdin; its output goes on."""
        ...

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal a new size."""
        ...

    async def status(self) -> ExecStatus:
        """Whether it runs, its exit code, its pid on the engine's host."""
        ...

    async def close(self) -> None:
        """Let go of the connection; the process is not touched."""
        ...


class Engine(Protocol):
    """The container engine. Raises EngineUnavailable (no answer) and EngineRejected (an answer that says no).

    "Already done" is success everywhere: starting what runs, stopping what is stopped, removing what is gone, and
    creating what the same operation has created.
    """

    async def info(self) -> EngineInfo:
        """What the engine is and what its host has."""
        ...

    async def image(self, reference: str) -> EngineImage | None:
        """An image that the engine has, by name or id."""
        ...

    async def image_names(self) -> tuple[str, ...]:
        """The names (`repository:tag`) of all images that have one."""
        ...

    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        """Fetch an image. Raises ImagePullFailed."""
        ...

    async def has_volume(self, name: str) -> bool:
        """Whether the engine has a volume of this name."""
        ...

    async def volume_names(self) -> tuple[str, ...]:
        """The names of all engine volumes."""
        ...

    async def create_volume(
        self, name: str, *, labels: Mapping[str, str], driver_options: Mapping[str, str]
    ) -> EngineVolume:
        """Make a volume of the engine's `local` driver, or find the one with the same LABEL_UID.

        Raises VolumeExists where the name is somebody else's.
        """
        ...

    async def inspect_volume(self, name: str) -> EngineVolume | None:
        """One volume; None when the engine says there is none."""
        ...

    async def remove_volume(self, name: str) -> None:
        """Remove an engine volume."""
        ...

    async def mounting(self, volume: str) -> tuple[EngineContainer, ...]:
        """Containers in any state, of whomever, that have this engine volume among their mounts."""
        ...

    async def create(self, blueprint: Blueprint) -> str:
        """Create a container and return its engine id."""
        ...

    async def inspect(self, engine_id: str) -> EngineContainer | None:
        """One container, by id or name; None when the engine says there is none."""
        ...

    async def find(self, labels: Mapping[str, str]) -> tuple[EngineContainer, ...]:
        """Containers in any state that carry all of `labels` (an empty value matches any)."""
        ...

    async def start(self, engine_id: str) -> None:
        """Start it. Raises PortInUse where the engine says so, StartFailed where the process could not begin."""
        ...

    async def stop(self, engine_id: str, timeout: float) -> None:
        """Stop it: its stop signal, then after `timeout` seconds SIGKILL; 0 kills at once."""
        ...

    async def pause(self, engine_id: str) -> None:
        """Freeze every process."""
        ...

    async def unpause(self, engine_id: str) -> None:
        """Thaw them."""
        ...

    async def update(
        self, engine_id: str, *, cpus: float, memory_bytes: int, restart_policy: RestartPolicy | None = None
    ) -> None:
        """Change its limits in place, 0 is none; and its restart policy, unless it is None."""
        ...

    async def rename(self, engine_id: str, name: str) -> None:
        """Give it another name; EngineRejected where something else has that."""
        ...

    async def exited_within(self, engine_id: str, seconds: float) -> int | None:
        """Its exit code if it stops running within `seconds`; None if it still runs then."""
        ...

    async def remove(self, engine_id: str) -> None:
        """Remove it, killing what runs; its volumes stay."""
        ...

    async def commit(
        self,
        engine_id: str,
        reference: str,
        labels: Mapping[str, str],
        *,
        author: str = "",
        comment: str = "",
        changes: Sequence[str] = (),
    ) -> str:
        """Make an image of its files, with the config it had, named `reference`; the id of the image.

        `changes` are Dockerfile lines that change that config.
        """
        ...

    async def tag(self, image: str, reference: str) -> None:
        """Name an image; another one that had the name loses it."""
        ...

    async def with_config_of(self, image_id: str, other_id: str, reference: str) -> str:
        """Make an image named `reference`, of the layers of one and the config of another; its id."""
        ...

    async def without_identity(self, image_id: str, base_id: str, reference: str) -> str:
        """Make an image named `reference` out of one that a commit made, less what tells which container that was.

        `base_id` is the image that the container was made from.
        """
        ...

    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        """Make an image named `reference` whose layers above the lowest `base_layers` are one; its id.

        Its config is that of image `config_of`. With `onto` that one layer lies on the layers of another image
        instead. Raises LayerCarryFailed, DiskFull.
        """
        ...

    async def remove_image(self, reference: str) -> None:
        """Remove an image by name or id; one that is still used stays, and that is no error."""
        ...

    def events(self, since_nanos: int) -> AsyncIterator[EngineEvent]:
        """Events of our containers from `since_nanos` on; raises EngineUnavailable when the stream breaks."""
        ...

    async def exec(self, engine_id: str, request: ExecRequest) -> ExecSession:
        """Start a process inside a running container."""
        ...


class GpuInventory(Protocol):
    """The cards of this host. Raises nothing: a driver that is missing or dies is a snapshot without cards."""

    async def snapshot(self) -> GpuSnapshot:
        """The cards with their telemetry, as of now."""
        ...


class CarryPlan(Record):
    """How a layer would be carried: see OperationPlan. `bytes_to_move` is 0 where nothing is copied."""

    method: CarryMethod
    bytes_to_move: int = 0
    bytes_available: int = 0
    warnings: tuple[str, ...] = ()


class LayerPair(Record):
    """The writable layers of a container and its successor, as they were before anything moved.

    Both paths were checked to be what the engine says they are. The inode numbers tell afterwards which of the two
    trees stands where: an exchange that may or may not have happened is found out, never guessed.
    """

    old_path: str
    old_inode: int
    new_path: str
    new_inode: int


class LayerStore(Protocol):
    """Carries a writable layer between two containers that do not run. Raises LayerCarryFailed, DiskFull.

    `exchange`, `exchange_back` and `copy` may be repeated: done twice is done once.
    """

    async def methods(self) -> tuple[tuple[CarryMethod, str], ...]:
        """Each method with the reason why it is not available here; an empty reason means that it is."""
        ...

    async def plan(self, old: EngineContainer) -> CarryPlan:
        """The best method for a container's layer on this host, and what it costs."""
        ...

    async def commit_plan(self, container: EngineContainer) -> CarryPlan:
        """What an image of a container's files costs, and what is lost in it; 0 bytes where that cannot be seen."""
        ...

    def commit_watched(
        self, container: EngineContainer, total: int, progress: Progress
    ) -> AbstractAsyncContextManager[None]:
        """While it is entered: tell how many bytes of `total` the engine has written of an image of its files.

        Where that cannot be seen, nothing is told. Raises nothing.
        """
        ...

    async def locate(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
        """The two layers, checked: same image, known storage driver, paths that exist and are the engine's.

        Nothing is moved, so the old one may still run.
        """
        ...

    async def exchange(self, pair: LayerPair) -> bool:
        """Swap the two trees. False, with nothing changed, where the kernel refuses across quota boundaries."""
        ...

    async def exchange_back(self, pair: LayerPair) -> None:
        """Undo an exchange if one happened."""
        ...

    async def copy(self, pair: LayerPair, progress: Progress) -> None:
        """Make the new tree equal to the old one and verify that it is."""
        ...


class SnapshotPlan(Record):
    """What keeping a layer takes: the bytes that are copied at most (0 where extents are shared), and the room."""

    method: SnapshotMethod
    bytes_to_copy: int = 0
    bytes_available: int = 0


class SnapshotStore(Protocol):
    """Keeps the files of writable layers as trees that never change. Raises SnapshotFailed, DiskFull.

    A snapshot is made in three steps, each of which may be repeated, also by another daemon: `gather`, `complete` and
    `seal`; until the last it is partial and belongs to its operation. `gather` may be left out. `previous` is an
    earlier snapshot of the same container, whose unchanged files are shared; it may be gone, or be of any age.
    After DiskFull nothing is left of the partial one.
    """

    async def method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        """How a container's layer would be kept here; None and the reason where it cannot be."""
        ...

    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        """What it takes; the container may run."""
        ...

    async def gather(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """Bring the bulk while the container may run, so that little is left to do when it does not."""
        ...

    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """Bring what changed since. The caller keeps the container still: it is paused or does not run.

        The time grows with the number of entries and with the files that changed. What was brought is in memory; only
        `seal` has it on the disk.
        """
        ...

    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        """Have it on the disk and make it final. Fails when the machine was started anew since `complete`."""
        ...

    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        """Remove what an operation made under this key, sealed or not; what another one made stays."""
        ...

    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        """Make the layer of a container that never ran equal to a sealed snapshot of the same image, and verify it."""
        ...

    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        """Make the layer of a container that never ran equal to another's of the same image.

        First, as often as wanted, while the source may run; last with `still`, when the caller keeps it still. Only
        after that one may the target be started.
        """
        ...

    async def remove(self, key: SnapshotKey) -> None:
        """Remove a sealed snapshot. Others that share files with it keep them."""
        ...

    async def remove_all(self, uid: str) -> None:
        """Remove everything of a container, partial ones too."""
        ...

    async def find(self) -> tuple[SnapshotKey, ...]:
        """Every sealed snapshot."""
        ...

    async def partials(self) -> tuple[tuple[SnapshotKey, str], ...]:
        """Every partial one with the operation that it belongs to."""
        ...


class ShrinkNeedsCopy(Exception):
    """A store cannot become smaller where it is; its files have to move to a smaller one. Nothing was changed."""


class VolumeBackend(Protocol):
    """One way to keep volumes on this host. Raises VolumeFailed, DiskFull, and what the methods name.

    Every method may be repeated: done twice is done once, also where the first time was cut off by `kill -9`. Calls
    that change one volume must not overlap; `usage`, `opened` and `pool` may be called at any time.
    """

    @property
    def kind(self) -> VolumeBackendKind:
        """Which one it is."""
        ...

    async def unavailable(self) -> str:
        """Why no volume can be made this way on this host; empty when one can."""
        ...

    async def create(self, uid: str, name: str, size_bytes: int) -> VolumeBacking:
        """Make an empty store, ready for the engine. Raises SizeNotSupported.

        The engine's volume is the caller's to make, from the backing's `engine_volume` and `driver_options`.
        """
        ...

    async def attach(self, backing: VolumeBacking) -> None:
        """Make it ready for the engine again, after a reboot say."""
        ...

    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """Make it larger where it is, under whatever uses it; the backing as it is then. Raises SizeNotSupported."""
        ...

    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """Make it smaller where it is, under whatever uses it; the backing as it is then.

        Raises VolumeTooSmallForData with nothing changed, and ShrinkNeedsCopy.
        """
        ...

    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:
        """Whether `shrink` to that size is known to raise ShrinkNeedsCopy. Where it is, `replacement` can be made."""
        ...

    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        """Make an empty store of another size that `exchange` can put in the place of this one.

        `destroy` needs no more of what this gives than its `kind` and `uid`. Raises SizeNotSupported.
        """
        ...

    async def content(self, backing: VolumeBacking) -> str:
        """Names what a store holds, wherever `exchange` brings it."""
        ...

    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        """Have `holder` hold `content`, which one of the two holds, and `other` what the other one holds.

        Both are given as they are to be afterwards, with the sizes that go with their contents. The
        engine volumes stay as they are and show it from their next mount on. Raises VolumeInUse, with nothing changed,
        while anything has either mounted.
        """
        ...

    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        """How full it is, whether it is mounted or not."""
        ...

    def opened(self, backing: VolumeBacking) -> AbstractAsyncContextManager[str]:
        """A folder in which the daemon sees the volume's files, whether the engine has it mounted or not.

        For its own reading and writing: what a program makes of the path may lead it elsewhere. While it is open,
        `destroy` says that it is in use.
        """
        ...

    async def destroy(self, backing: VolumeBacking) -> None:
        """Remove the store and all that is in it. Raises VolumeInUse while anything has it mounted."""
        ...

    async def pool(self) -> PoolUsage:
        """The filesystem that the stores lie on, and what all of them have of it."""
        ...


class VolumeCopier(Protocol):
    """Carries a volume's files to another store. Raises VolumeFailed, DiskFull."""

    async def copy(
        self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, thorough: bool = False
    ) -> None:
        """Make the target's files equal to the source's, moving only what differs by size or time of modification.

        The source may be in use: call it again, once nothing writes any more, for what has changed meanwhile.
        `thorough` reads everything on both sides instead of believing sizes and times, which a memory-mapped file can
        outwit. `progress` counts bytes inside files.
        """
        ...

    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        """What both hold, read again in full, while neither is in use. Raises VolumeFailed where they differ."""
        ...


class PortProbe(Protocol):
    """Tells whether a host port can be bound right now."""

    def __call__(self, protocol: str, port: int) -> Awaitable[bool]:
        """True when nothing listens on it."""
        ...


class ProcessControl(Protocol):
    """Signals to processes inside containers, by the pid that the engine shows for them."""

    def alive(self, pid: int, engine_id: str) -> bool:
        """Whether `pid` is a living process of that container."""
        ...

    def signal(self, pid: int, engine_id: str, signal_number: int, *, session: bool = False) -> bool:
        """Send a signal to a process, or to its whole session; False when it is not there or not that container's."""
        ...
