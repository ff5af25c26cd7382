"""A gpudockd that kills itself, with SIGKILL, at a chosen moment of an operation.

`python -m tests.faults.mortal FLAGS…` is gpudockd with instruments between core and its ports. They count the moments
of the first operation of a kind that begins in this process: before each of its transactions on the store and before
each call to the engine, the snapshots or the volumes that is made while it is under way, and after its last
transaction. At the moment with the number in GPUDOCK_TEST_DIE_AT the process ends as `kill -9` ends it. Nothing here
knows the steps: a new step has new moments, and a test that counts up until an operation survives has met them all.

After one of these and before the next is one moment, not two: nothing that outlives the daemon happens between them,
and what survives a `kill -9` is all that the next daemon can go by.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from gpudock_server.app import Instruments, run
from gpudock_server.model.changes import Change, PutOperation
from gpudock_server.model.operation import OperationKind
from gpudock_server.ports import Engine, HostPaths, Ledger, SnapshotStore, Store, VolumeBackend, VolumeCopier
from gpudock_server.settings_sources import load

KIND = "GPUDOCK_TEST_KIND"
DIE_AT = "GPUDOCK_TEST_DIE_AT"


class Countdown:
    """Counts the moments of one operation."""

    def __init__(self, kind: OperationKind, die_at: int) -> None:
        self._kind = kind
        self._die_at = die_at
        self._moments = 0
        self._operation_id = ""
        self._over = False

    def moment(self, name: str) -> None:
        """A moment has come; perhaps the last."""
        if not self._operation_id or self._over:
            return
        self._moments += 1
        if self._moments == self._die_at:
            sys.stderr.write(f"dying at moment {self._moments}: {name}\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def sees(self, changes: Sequence[Change]) -> str:
        """What to call a transaction of the operation; empty if it is another's."""
        for change in changes:
            if isinstance(change, PutOperation) and change.operation.kind is self._kind:
                if not self._operation_id and change.expect == 0:
                    self._operation_id = change.operation.id
                if change.operation.id == self._operation_id:
                    done = [stage.name for stage in change.operation.stages if stage.state.value == "DONE"]
                    return f"record of {change.operation.state.value} after {done[-1] if done else 'nothing'}"
        return ""

    def ends(self, changes: Sequence[Change]) -> bool:
        """Whether this transaction records the operation's end."""
        return any(
            isinstance(change, PutOperation)
            and change.operation.id == self._operation_id
            and change.operation.state.ended
            for change in changes
        )

    def stop(self) -> None:
        """Count no more."""
        self._over = True


class MortalStore:
    """A store whose transactions are moments."""

    def __init__(self, store: Store, countdown: Countdown) -> None:
        self._store = store
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def apply(self, changes: Sequence[Change]) -> int:
        """The store's own, at a moment; the last has one behind it too."""
        name = self._countdown.sees(changes)
        if not name:
            return await self._store.apply(changes)
        self._countdown.moment(f"before {name}")
        version = await self._store.apply(changes)
        if self._countdown.ends(changes):
            self._countdown.moment(f"after {name}")
            self._countdown.stop()
        return version


class MortalEngine:
    """An engine whose changing calls are moments."""

    CHANGING = frozenset(
        {"pull", "create", "start", "stop", "pause", "unpause", "update", "remove", "commit", "remove_image",
         "create_volume", "remove_volume", "tag", "with_config_of", "without_identity", "flatten"}
    )  # fmt: skip

    def __init__(self, engine: Engine, countdown: Countdown) -> None:
        self._engine = engine
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._engine, name)
        return _watched(call, name, self._countdown) if name in self.CHANGING else call


class MortalSnapshots:
    """A snapshot store whose changing calls are moments."""

    CHANGING = frozenset({"gather", "complete", "seal", "discard", "restore", "mirror", "remove", "remove_all"})

    def __init__(self, snapshots: SnapshotStore, countdown: Countdown) -> None:
        self._snapshots = snapshots
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._snapshots, name)
        return _watched(call, name, self._countdown) if name in self.CHANGING else call


class MortalHostPaths:
    """Host paths whose binds and releases are moments."""

    CHANGING = frozenset({"bind", "release"})

    def __init__(self, host_paths: HostPaths, countdown: Countdown) -> None:
        self._host_paths = host_paths
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._host_paths, name)
        return _watched(call, name, self._countdown) if name in self.CHANGING else call


class MortalLedger:
    """A ledger whose changes are moments."""

    CHANGING = frozenset({"write", "forget", "forget_all"})

    def __init__(self, ledger: Ledger, countdown: Countdown) -> None:
        self._ledger = ledger
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._ledger, name)
        return _watched(call, name, self._countdown) if name in self.CHANGING else call


class MortalVolumes:
    """A volume backend whose changing calls are moments."""

    CHANGING = frozenset({"create", "grow", "shrink", "replacement", "exchange", "destroy"})

    def __init__(self, backend: VolumeBackend, countdown: Countdown) -> None:
        self._backend = backend
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._backend, name)
        return _watched(call, name, self._countdown) if name in self.CHANGING else call


class MortalCopier:
    """A copier whose copies are moments."""

    CHANGING = frozenset({"copy"})

    def __init__(self, copier: VolumeCopier, countdown: Countdown) -> None:
        self._copier = copier
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._copier, name)
        return _watched(call, name, self._countdown) if name in self.CHANGING else call


def _watched(call: Any, name: str, countdown: Countdown) -> Any:
    async def watched(*words: object, **named: object) -> object:
        countdown.moment(f"before {name}")
        return await call(*words, **named)

    return watched


def main() -> int:
    """Runs the daemon."""
    countdown = Countdown(OperationKind(os.environ[KIND]), int(os.environ[DIE_AT]))
    instruments = Instruments(
        engine=lambda engine: MortalEngine(engine, countdown),
        store=lambda store: MortalStore(store, countdown),
        snapshots=lambda snapshots: MortalSnapshots(snapshots, countdown),
        host_paths=lambda host_paths: MortalHostPaths(host_paths, countdown),
        ledger=lambda ledger: MortalLedger(ledger, countdown),
        volumes=lambda backend: MortalVolumes(backend, countdown),
        copier=lambda copier: MortalCopier(copier, countdown),
    )
    return run(load(sys.argv[1:]).settings, instruments)


if __name__ == "__main__":
    sys.exit(main())
