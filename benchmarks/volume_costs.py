"""Volumes with a size: the time of a resize, and write throughput compared with an engine volume."""

from __future__ import annotations

import itertools

from gpudock.v1 import container_pb2

from benchmarks.environment import Environment, Stopwatch
from benchmarks.report import Row, Target, Unit, versus
from benchmarks.rounds import Measure, compare
from tests.calls import IDLE, IMAGE, Caller

_MIB = 1 << 20
_MB = 1_000_000
_GROWTH = Target(300, unit="ms")
_FLAT = Target(1.5)
_WRITES = Target(0.9, at_least=True)
_STEP_BYTES = 16 * _MIB
# Free space, so that the volume can shrink, and grow in many steps.
_SPARE_BYTES = 1024 * _MIB
_DATA = {"empty": 0, "0.3 GB": 300, "1 GB": 1000, "5 GB": 5000}
_QUICK = ("empty", "0.3 GB")
_SIZE = 512 * _MIB


async def measure_volumes(environment: Environment) -> list[Row]:
    """Measure growing in use with different amounts of data, shrinking, creating, and writing inside."""
    async with environment.daemon() as (caller, _):
        rows = await _measure_growing(environment, caller)
        await caller.delete_all()
        rows += await _measure_shrinking(environment, caller)
        await caller.delete_all()
        rows += await _measure_creating(environment, caller)
        await caller.delete_all()
        return rows + await _measure_writing(environment, caller)


async def _create_filled(caller: Caller, name: str, megabytes: int, size_bytes: int) -> None:
    """Create a volume and a container that mounts it, and write `megabytes` of data."""
    await caller.create_volume(name, size_bytes)
    await caller.create(name, mounts=[container_pb2.Mount(volume=name, target="/data")])
    # Files of at most 100 MB without zeros, so that all of it must be copied.
    for number, left in enumerate(range(megabytes, 0, -100)):
        script = f"head -c {min(left, 100) * _MB} /dev/urandom > /data/{number} && sync"
        await caller.shell(name, script)


async def _measure_growing(environment: Environment, caller: Caller) -> list[Row]:
    data = {what: size for what, size in _DATA.items() if not environment.quick or what in _QUICK}
    ways: dict[str, Measure] = {}
    for what, megabytes in data.items():
        name = f"grows-{megabytes}"
        size = megabytes * _MB + _SPARE_BYTES
        await _create_filled(caller, name, megabytes, size)
        sizes = itertools.count(size + _STEP_BYTES, _STEP_BYTES)

        async def grow(name: str = name, sizes: itertools.count[int] = sizes) -> float:
            watch = Stopwatch()
            await caller.resize_volume(name, next(sizes))
            return watch.ms

        ways[what] = grow
    samples = await compare(environment.rounds(18), ways)
    rows = [
        Row(
            name=f"grow a volume in use, {what}",
            unit=Unit.MS,
            samples={what: samples.by_name[what]},
            target=_GROWTH,
        )
        for what in data
    ]
    smallest, largest = next(iter(data)), list(data)[-1]
    name, against = f"grow a volume in use, {largest}", f"gpudock, {smallest}"
    return [*rows, versus(samples, largest, smallest, name=name, unit=Unit.MS, against=against, target=_FLAT)]


async def _measure_shrinking(environment: Environment, caller: Caller) -> list[Row]:
    """Measure megabytes of data per second, from the call until the container runs with the smaller volume."""
    megabytes = 300 if environment.quick else 1000
    size = megabytes * _MB + _SPARE_BYTES
    await _create_filled(caller, "shrinks", megabytes, size)
    volume = await caller.volume("shrinks")

    async def shrink() -> float:
        watch = Stopwatch()
        await caller.resize_volume("shrinks", size - _SPARE_BYTES // 2)
        seconds = watch.ms / 1e3
        await caller.resize_volume("shrinks", size)
        return megabytes / seconds

    samples = await compare(environment.rounds(6), {"shrink": shrink})
    return [
        Row(
            name=f"shrink a volume in use, {megabytes / 1000:g} GB on {volume.filesystem}",
            unit=Unit.MB_PER_S,
            samples=samples.by_name,
        )
    ]


async def _measure_creating(environment: Environment, caller: Caller) -> list[Row]:
    numbers = itertools.count()

    def by_gpudock(size_bytes: int) -> Measure:
        async def create() -> float:
            name = f"made-{next(numbers)}"
            watch = Stopwatch()
            await caller.create_volume(name, size_bytes)
            taken = watch.ms
            await caller.delete_volume(name)
            return taken

        return create

    async def by_docker() -> float:
        name = f"theirs-{next(numbers)}"
        taken = await environment.docker.time("volume", "create", name)
        await environment.engine("DELETE", f"/volumes/{name}")
        return taken

    ways = {"with a size": by_gpudock(_SIZE), "without": by_gpudock(0), "docker volume create": by_docker}
    samples = await compare(environment.rounds(18), ways)
    return [
        versus(samples, "with a size", "docker volume create", name="create a volume of 512 MiB", unit=Unit.MS),
        versus(samples, "without", "docker volume create", name="create a volume without a size", unit=Unit.MS),
    ]


async def _measure_writing(environment: Environment, caller: Caller) -> list[Row]:
    """Write by `docker exec` on both sides, to a volume of gpudock and to an engine volume."""
    megabytes = 100 if environment.quick else 300
    await _create_filled(caller, "writes", 0, _SIZE)
    sized = (await caller.get("writes")).status.engine_id
    host = {"Binds": ["bench-plain:/data"]}
    made = await environment.engine(
        "POST", "/containers/create", send={"Image": IMAGE, "Cmd": list(IDLE), "HostConfig": host}
    )
    await environment.engine("POST", f"/containers/{made['Id']}/start")

    def writing(container: str) -> Measure:
        script = f"rm -f /data/file && dd if=/dev/zero of=/data/file bs=1M count={megabytes} conv=fsync"

        async def write() -> float:
            taken = await environment.docker.time("exec", container, "sh", "-c", script)
            return megabytes * _MIB / _MB / (taken / 1e3)

        return write

    samples = await compare(environment.rounds(12), {"volume": writing(sized), "engine volume": writing(made["Id"])})
    await environment.discard(made["Id"])
    name, against = f"write {megabytes} MiB inside, synced", "engine volume without a size"
    return [versus(samples, "volume", "engine volume", name=name, unit=Unit.MB_PER_S, against=against, target=_WRITES)]
