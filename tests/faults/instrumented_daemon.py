"""A gpudockd that kills itself, with SIGKILL, at a chosen moment of an operation.

`python -m tests.faults.instrumented_daemon FLAGS…` is gpudockd with wrappers between core and its ports, and around the
child processes that its adapters start. They count moments, in two groups:

- before each store transaction, before each call of a port that changes something, and after the last record of the
  operation. The time after such a moment and before the next is one moment, because nothing that outlives the daemon
  happens in it.
- during calls that take time: in a call of the engine or the layers, when a child process has started, and while it
  runs. The daemon is killed GPUDOCK_TEST_DELAY_MS milliseconds after the begin of the call, or at its end.

GPUDOCK_TEST_PHASE says which moments count: those of the first operation of the kind GPUDOCK_TEST_KIND that begins in
this process (BEGUN); those of its undo, for which the commit is refused (UNDOING); or all since the start of the daemon
(RESUMED). Each moment is printed. At the moment in GPUDOCK_TEST_DIE_AT, a number (`7`, `during 3`) or a name, the
process gets the signal GPUDOCK_TEST_SIGNAL, by default SIGKILL.

The steps of operations are not named here, so that a new step has its moments without a change. `CALLS` says which
calls of a port change something; a test fails if it does not name every call.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from gpudock_server.adapters.host.trees.worker import TreeWorker
from gpudock_server.app import PortWrappers, run
from gpudock_server.errors import EngineRejected
from gpudock_server.model.operation import Operation, OperationKind, OperationState, StageState
from gpudock_server.model.store_changes import PutOperation, StoreChange
from gpudock_server.ports import (
    Engine,
    HostPaths,
    LayerStore,
    RevisionBackupStore,
    SnapshotStore,
    Store,
    VolumeBackend,
    VolumeCopier,
)
from gpudock_server.settings.sources import load

T = TypeVar("T")

KIND = "GPUDOCK_TEST_KIND"
PHASE = "GPUDOCK_TEST_PHASE"
DIE_AT = "GPUDOCK_TEST_DIE_AT"
DELAY_MS = "GPUDOCK_TEST_DELAY_MS"
SIGNAL = "GPUDOCK_TEST_SIGNAL"

DURING = "during "
REFUSAL = "a test refuses the commit"

# For each port: the calls that change something outside of the daemon, and the other calls.
CALLS: dict[type, tuple[frozenset[str], frozenset[str]]] = {
    Engine: (
        frozenset(
            {"pull", "create", "create_file_holder", "start", "stop", "pause", "unpause", "update", "rename", "remove",
             "commit", "tag", "replace_config", "strip_identity", "flatten", "remove_image", "create_volume",
             "remove_volume", "exec"}
        ),
        frozenset(
            {"info", "image", "image_names", "image_ids", "volume_names", "find_volumes",
             "inspect_volume", "mounting", "inspect", "find", "exited_within", "events"}
        ),
    ),
    LayerStore: (
        frozenset({"exchange", "exchange_back", "copy"}),
        frozenset(
            {"accounts", "methods", "plan", "commit_plan", "commit_cost", "require_committable",
             "report_commit_progress", "locate"}
        ),
    ),
    SnapshotStore: (
        frozenset({"gather", "complete", "seal", "discard", "restore", "mirror", "remove", "remove_all"}),
        frozenset({"method", "plan", "sealed", "find", "partials"}),
    ),
    HostPaths: (frozenset({"bind", "release"}), frozenset({"check", "source", "names"})),
    RevisionBackupStore: (frozenset({"write", "delete", "delete_all"}), frozenset({"read", "uids"})),
    VolumeBackend: (
        frozenset({"create", "attach", "grow", "shrink", "replacement", "exchange", "destroy"}),
        frozenset(
            {"kind", "unavailable_reason", "backings_on_disk", "needs_copy", "content", "usage", "open_files", "pool"}
        ),
    ),
    VolumeCopier: (frozenset({"copy"}), frozenset({"verify"})),
}  # fmt: skip
# The ports whose changing calls have a moment during the call. Other ports use child processes, which have moments.
LASTING = frozenset({Engine, LayerStore})
# Calls of other ports that always start a child process.
BY_CHILDREN = frozenset(
    {"SnapshotStore.gather", "SnapshotStore.complete", "SnapshotStore.mirror", "SnapshotStore.restore",
     "VolumeCopier.copy"}
)  # fmt: skip
# Programs that change nothing, and options with which a program changes nothing.
_READ_ONLY_PROGRAMS = frozenset({"du", "findmnt", "modprobe"})
_READ_ONLY_OPTIONS = frozenset({"--json", "--version", "-V"})
# The jobs of the tree worker, a child process: those that change something, and the others.
JOBS: tuple[frozenset[str], frozenset[str]] = (
    frozenset({"gather", "complete", "fill", "merge_layers", "mirror", "remove"}),
    frozenset({"measure", "longest_path", "check", "differences", "digest", "index_layer"}),
)


class Phase(StrEnum):
    """Which moments count; see the module's docstring."""

    BEGUN = "BEGUN"
    UNDOING = "UNDOING"
    RESUMED = "RESUMED"


class Moments:
    """Counts the moments of one operation, and sends a signal to this process at one of them."""

    def __init__(self, kind: OperationKind, phase: Phase, die_at: str, delay_seconds: float, number: int) -> None:
        """`number` is the signal to send."""
        self._kind = kind
        self._phase = phase
        self._die_at = die_at
        self._delay_seconds = delay_seconds
        self._signal = number
        self._counts = {"": 0, DURING: 0}
        self._operation_id = ""
        self._stage = "recovery"
        self._counting = phase is Phase.RESUMED
        self._over = False
        # The chosen moment has come; the signal is sent after the delay.
        self._dying = False

    def now(self, name: str, group: str = "") -> None:
        """Count a moment; send the signal if it is the chosen one."""
        if self._count(name, group):
            self._die()

    async def during(self, name: str, work: Awaitable[T]) -> T:
        """Count a moment and await `work`; send the signal meanwhile if the moment is the chosen one."""
        if not self._count(name, DURING):
            return await work
        self._dying = True
        asyncio.get_running_loop().call_later(self._delay_seconds, self._die)
        try:
            return await work
        finally:
            self._die()

    def _count(self, name: str, group: str) -> bool:
        if self._dying:
            self._die()
        if not self._counting:
            return False
        self._counts[group] += 1
        number = f"{group}{self._counts[group]}"
        _print(f"moment {number} [{self._stage}]: {name}")
        if self._die_at not in (number, name):
            return False
        _print(f"dying at moment {number} [{self._stage}]: {name}")
        return True

    def _die(self) -> None:
        _print(f"children: {' '.join(children())}")
        self._dying = False
        os.kill(os.getpid(), self._signal)

    # -- records of the operation ------------------------------------------------------------------------------------

    def describe(self, changes: Sequence[StoreChange]) -> str:
        """The name of a transaction; the first record of the phase starts the count."""
        own = self._tracked_operation(changes)
        if own is None:
            return f"a transaction with {', '.join(sorted({type(change).__name__ for change in changes}))}"
        if self._phase is Phase.BEGUN or own.state is OperationState.UNDOING:
            self._counting = self._counting or not self._over
        done = [stage.name for stage in own.stages if stage.state is StageState.DONE]
        return f"record of {own.state.value} after {done[-1] if done else 'nothing'}"

    def refuses(self, changes: Sequence[StoreChange]) -> bool:
        """Whether a transaction is the commit that must fail, so that the operation is undone."""
        own = self._tracked_operation(changes)
        if own is None or self._phase is not Phase.UNDOING or self._counting or self._over:
            return False
        return own.committed

    def recorded(self, changes: Sequence[StoreChange]) -> bool:
        """Update the current stage after a transaction; returns whether the transaction ends the operation."""
        own = self._tracked_operation(changes)
        if own is None:
            return False
        done = [stage.name for stage in own.stages if stage.state is StageState.DONE]
        waiting = [stage.name for stage in own.stages if stage.state is not StageState.DONE]
        if own.state is OperationState.UNDOING:
            self._stage = f"undo of {done[-1]}" if done else "abandon"
        else:
            self._stage = waiting[0] if waiting and not own.state.ended else "end"
        return own.state.ended and self._phase is not Phase.RESUMED

    def stop(self) -> None:
        """Stop counting."""
        self._counting, self._over = False, True

    def _tracked_operation(self, changes: Sequence[StoreChange]) -> Operation | None:
        """The counted operation, if the transaction has its record: the first of its kind that begins or is resumed."""
        for change in changes:
            if isinstance(change, PutOperation) and change.operation.kind is self._kind:
                if not self._operation_id and (change.expect == 0 or self._phase is Phase.RESUMED):
                    self._operation_id = change.operation.id
                    self._stage = change.operation.stages[0].name if change.operation.stages else "end"
                    _print(f"stages: {' '.join(stage.name for stage in change.operation.stages)}")
                if change.operation.id == self._operation_id:
                    return change.operation
        return None


class InstrumentedStore:
    """A store with a moment before each transaction, and after the last record of the operation."""

    def __init__(self, store: Store, moments: Moments) -> None:
        self._store = store
        self._moments = moments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def apply(self, changes: Sequence[StoreChange]) -> int:
        """See `Store.apply`."""
        name = self._moments.describe(changes)
        self._moments.now(f"before {name}")
        if self._moments.refuses(changes):
            raise EngineRejected(call="commit", status=500, detail=REFUSAL)
        version = await self._store.apply(changes)
        if self._moments.recorded(changes):
            self._moments.now(f"after {name}")
            self._moments.stop()
        return version


class InstrumentedPort:
    """A port with a moment before each changing call and, for LASTING, during it."""

    def __init__(self, port: type, adapter: object, moments: Moments) -> None:
        self._changing, _ = CALLS[port]
        self._port = port
        self._adapter = adapter
        self._moments = moments

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._adapter, name)
        return self._instrumented(call, name) if name in self._changing else call

    def _instrumented(self, call: Callable[..., Awaitable[Any]], name: str) -> Any:
        async def instrumented(*words: object, **named: object) -> object:
            whole = f"{self._port.__name__}.{name}"
            self._moments.now(f"before {whole}")
            work = call(*words, **named)
            return await (self._moments.during(f"in {whole}", work) if self._port in LASTING else work)

        return instrumented


def watch_children(moments: Moments) -> None:
    """Add moments when a child process has started and while it runs."""
    start, call = asyncio.create_subprocess_exec, TreeWorker.call
    # The event loop keeps only weak references to tasks.
    watches: set[asyncio.Future[int]] = set()

    async def started(*words: Any, **named: Any) -> asyncio.subprocess.Process:
        process = await start(*words, **named)
        if name := program(words):
            moments.now(f"as {name} starts", DURING)
            if name != _WORKER:
                watch = asyncio.ensure_future(moments.during(f"while {name} runs", process.wait()))
                watches.add(watch)
                watch.add_done_callback(watches.discard)
        return process

    async def called(worker: TreeWorker, job: str, *words: Any, **named: Any) -> Any:
        work = call(worker, job, *words, **named)
        return await (moments.during(f"while job {job} runs", work) if job in JOBS[0] else work)

    asyncio.create_subprocess_exec = started
    TreeWorker.call = called  # type: ignore[method-assign,assignment]  # same parameters


_WORKER = "tree worker"


def program(words: Sequence[object]) -> str:
    """The name of the program that a command runs; empty if the program changes nothing.

    The prefixes of `with_parent_death_signal` and `MountedView.nsenter_command` are left out.
    """
    command = [str(word) for word in words]
    if command[0] == sys.executable:
        return _WORKER
    if command[0] == "setpriv" and str(os.getpid()) in command:
        command = command[command.index(str(os.getpid())) + 1 :]
    if command[0] == "nsenter":
        command = command[command.index("--") + 1 :]
    name = Path(command[0]).name
    return "" if name in _READ_ONLY_PROGRAMS or _READ_ONLY_OPTIONS & set(command) else name


def children() -> list[str]:
    """The child processes of this process that have not been waited for, each as `pid:name`."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text().split():
            with suppress(OSError):  # another thread has waited for it meanwhile
                found.append(f"{pid}:{Path('/proc', pid, 'comm').read_text().strip().replace(' ', '-')}")
    return found


def _print(line: str) -> None:
    os.write(2, f"{line}\n".encode())


def main() -> int:
    """Run the daemon; returns its exit code."""
    moments = Moments(
        OperationKind(os.environ[KIND]),
        Phase(os.environ.get(PHASE, Phase.BEGUN)),
        os.environ.get(DIE_AT, ""),
        float(os.environ.get(DELAY_MS, "0")) / 1000,
        signal.Signals[os.environ.get(SIGNAL, "SIGKILL")],
    )
    watch_children(moments)

    def instrument(port: type) -> Any:
        return lambda adapter: InstrumentedPort(port, adapter, moments)

    wrappers = PortWrappers(
        engine=instrument(Engine),
        store=lambda store: InstrumentedStore(store, moments),
        layers=instrument(LayerStore),
        snapshots=instrument(SnapshotStore),
        host_paths=instrument(HostPaths),
        revision_backups=instrument(RevisionBackupStore),
        volumes=instrument(VolumeBackend),
        copier=instrument(VolumeCopier),
    )
    return run(load(sys.argv[1:]).settings, wrappers)


if __name__ == "__main__":
    sys.exit(main())
