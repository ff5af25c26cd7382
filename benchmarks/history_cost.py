"""What history costs: downtime of scale and rollback while a process writes, and the disk that a revision takes.

The files of the revision that ends are kept each time. Most of them are copied before the container stops, so the
downtime must not grow with the layer; and what did not change is shared, so a further revision must take no more disk
than what changed since the one before.
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
# 10 MB a second, into a hundred files in turn, for as long as it lives.
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
    """Scale and rollback beside stop, create and start by hand, which loses the files; then the disk."""
    rows: list[Row] = []
    layers = {what: size for what, size in _LAYERS.items() if not environment.quick or what in _QUICK}
    async with environment.daemon("--keep-revisions", "4") as (caller, _):
        for way in ("scale", "rollback"):
            ways = {}
            for what, size in layers.items():
                changed = _Changed(environment, caller, f"{way}-{size // _MB}")
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


class _Changed:
    """A container in which a process writes, scaled from 1 GPU to 2 and back, or returned to a revision."""

    def __init__(self, environment: Environment, caller: Caller, name: str) -> None:
        self._environment = environment
        self._caller = caller
        self._name = name

    async def make(self, layer_bytes: int) -> None:
        """Create it with so much in its writable layer, in files of 50 MB, and with a revision to return to."""
        await self._caller.create(self._name, 1, command=_WRITER)
        await _fill(self._caller, self._name, layer_bytes)
        await self._caller.scale(self._name, 2)

    async def scale(self) -> float:
        """Milliseconds without a process."""
        gpus = 3 - (await self._caller.get(self._name)).spec.gpus.count
        return await self._downtime(self._caller.containers.ScaleContainer(scale_request(self._name, gpus)))

    async def rollback(self) -> float:
        """To the latest revision with other GPUs; milliseconds without a process."""
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
    """What the engine's data folder grows by with a further revision, when so much has changed since the one before.

    The container keeps all of these revisions: one that is pruned meanwhile would be taken off.
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
    """Bytes of the blocks that all below a folder has on its filesystem, each inode counted once.

    What is buffered is written first, since some filesystems give out blocks only then. Blocks that two files share,
    where a filesystem can do that, count twice: the figure may be too large there, and never too small.
    """
    await asyncio.to_thread(os.sync)
    words = ("du", "--summarize", "--one-file-system", "--block-size=1", "--", folder)
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    # It ends with 1 where something was removed before its eyes, as the engine's own files of a moment are.
    said, _ = await process.communicate()
    return int(said.split()[0])
