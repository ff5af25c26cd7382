"""The cost of history: downtime of scale and rollback while a process writes, and disk usage of a revision.

The files of each ending revision are kept. Most of them are copied before the container stops, so that the downtime
must not grow with the layer. Unchanged files are shared, so that a revision must not need more disk space than the
files that were changed since the revision before.
"""

from __future__ import annotations

import asyncio
import os
from datetime import datetime

from gpudock.v1 import container_pb2, container_service_pb2

from benchmarks.environment import Environment
from benchmarks.report import Row, Target, Unit, versus
from benchmarks.rounds import compare
from benchmarks.scale_downtime import BY_HAND, ScriptedReplacement, has_started, ms_between
from tests.calls import Caller, scale_request
from tests.rig import RigError

_TARGET = Target(1.5)
_FLAT = Target(1.5)
_SHARED = Target(1.2)
_MB = 1_000_000
_FILE_BYTES = 50 * _MB
# Writes 10 MB per second to a hundred files in turn, until it is stopped.
_WRITING = """
trap 'exit 0' TERM
mkdir -p /log
i=0
while :; do
  head -c 1000000 /dev/zero > /log/$((i % 100))
  i=$((i + 1))
  sleep 0.1 & wait $!
done
"""
_WRITER = ("sh", "-c", _WRITING)
_LAYERS = {"empty layer": 0, "0.3 GB": 300 * _MB, "1 GB": 1000 * _MB, "5 GB": 5000 * _MB}
_QUICK = ("empty layer", "0.3 GB")


async def measure_history(environment: Environment) -> list[Row]:
    """Compare scale and rollback with stop, create and start, which lose the files; then measure disk usage."""
    rows: list[Row] = []
    layers = {what: size for what, size in _LAYERS.items() if not environment.quick or what in _QUICK}
    async with environment.daemon("--keep-revisions", "4") as (caller, _):
        for way in ("scale", "rollback"):
            ways = {}
            for what, size in layers.items():
                changed = _ChangingContainer(environment, caller, f"{way}-{size // _MB}")
                await changed.make(size)
                ways[what] = changed.scale if way == "scale" else changed.rollback
            by_hand = ScriptedReplacement(environment, _WRITER)
            samples = await compare(environment.rounds(12), {**ways, BY_HAND: by_hand.by_command_line})
            for what in layers:
                name = f"{way} downtime, {what}, 10 MB/s written"
                rows.append(versus(samples, what, BY_HAND, name=name, unit=Unit.MS, target=_TARGET))
            largest, smallest = list(layers)[-1], next(iter(layers))
            name = f"{way} downtime, {largest}, 10 MB/s written"
            against = f"gpudock, {smallest}"
            rows.append(versus(samples, largest, smallest, name=name, unit=Unit.MS, against=against, target=_FLAT))
            await caller.delete_all()
        rows += await _disk(environment, caller, 300 * _MB if environment.quick else 1000 * _MB)
    return rows


class _ChangingContainer:
    """A container with a writing process, which is scaled between 1 and 2 GPUs or rolled back."""

    def __init__(self, environment: Environment, caller: Caller, name: str) -> None:
        self._environment = environment
        self._caller = caller
        self._name = name

    async def make(self, layer_bytes: int) -> None:
        """Create the container with `layer_bytes` in its writable layer, in files of 50 MB, and an older revision."""
        await self._caller.create(self._name, 1, command=_WRITER)
        await _fill(self._caller, self._name, layer_bytes)
        await self._caller.scale(self._name, 2)

    async def scale(self) -> float:
        """Scale; returns the downtime in milliseconds."""
        gpus = 3 - (await self._caller.get(self._name)).spec.gpus.count
        return await self._downtime(self._caller.containers.ScaleContainer(scale_request(self._name, gpus)))

    async def rollback(self) -> float:
        """Roll back to the latest revision with another number of GPUs; returns the downtime in milliseconds."""
        gpus = (await self._caller.get(self._name)).spec.gpus.count
        kept = [revision for revision in await self._caller.revisions(self._name) if revision.HasField("snapshot")]
        revision = max(revision.revision for revision in kept if revision.spec.gpus.count != gpus)
        request = container_service_pb2.RollbackContainerRequest(name=self._name, revision=revision)
        return await self._downtime(self._caller.containers.RollbackContainer(request))

    async def _downtime(self, stream: object) -> float:
        old = (await self._caller.get(self._name)).status.engine_id
        finished: datetime | None = None
        new = ""
        async for answer in stream:  # type: ignore[attr-defined]  # the stubs' streams have no common type
            if answer.WhichOneof("event") == "result":
                new = answer.result.status.engine_id
            elif finished is None and has_started(answer.operation):
                finished = await self._environment.moment(old, "FinishedAt")
        if finished is None or new in ("", old):
            raise RigError("the container was not replaced")
        return ms_between(finished, await self._environment.moment(new, "StartedAt"))


async def _fill(caller: Caller, name: str, layer_bytes: int) -> None:
    count = layer_bytes // _FILE_BYTES
    script = f"mkdir -p /data; for i in $(seq {count}); do head -c {_FILE_BYTES} /dev/zero > /data/$i; done; sync"
    await caller.shell(name, script)


async def _disk(environment: Environment, caller: Caller, layer_bytes: int) -> list[Row]:
    """Measure the growth of the engine's data folder by one revision, for several amounts of changed files.

    The container keeps all of these revisions, because pruning would free space.
    """
    await caller.create("disk", 0, revision_policy=container_pb2.RevisionPolicy(keep_revisions=100))
    await _fill(caller, "disk", layer_bytes)
    root = str((await environment.engine("GET", "/info"))["DockerRootDir"])
    cpus = 1.0
    rows = []
    await caller.scale("disk", cpus=cpus)
    for changed in (0, 10 * _MB, 100 * _MB):
        await caller.shell("disk", f"head -c {changed} /dev/urandom > /changed; sync")
        before = await _allocated(root)
        cpus += 0.1
        await caller.scale("disk", cpus=cpus)
        taken = await _allocated(root) - before
        *_, last, _current = await caller.revisions("disk")
        if not last.HasField("snapshot"):
            raise RigError("the files of the revision that ended were not kept")
        rows.append(
            Row(
                name=f"disk of a further revision of {layer_bytes // _MB} MB",
                unit=Unit.MB,
                samples={"gpudock": [taken / _MB], "changed": [changed / _MB]},
                against="changed since the one before",
                target=_SHARED if changed else None,
            )
        )
    await caller.delete("disk")
    return rows


async def _allocated(folder: str) -> int:
    """The bytes of all blocks below a folder on its filesystem; each inode counts once.

    Buffered data are written first, because some filesystems allocate blocks only then. Blocks that files share count
    for each file, so that the result may be too large and is never too small.
    """
    await asyncio.to_thread(os.sync)
    words = ("du", "--summarize", "--one-file-system", "--block-size=1", "--", folder)
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    # It ends with 1 if a file was removed meanwhile, as temporary files of the engine are.
    output, _ = await process.communicate()
    return int(output.split()[0])
