"""`python -m benchmarks [--quick] [--check] [NAME…]`: measure, print the table, save it with every sample."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from benchmarks import machine, report
from benchmarks.arena import Arena
from benchmarks.creating import creating
from benchmarks.docker_cli import DockerCli
from benchmarks.executing import executing
from benchmarks.history import history
from benchmarks.reading import reading
from benchmarks.report import Row
from benchmarks.scaling import scaling
from benchmarks.volumes import volumes
from tests.rig import BUSYBOX, GLIBC, Rig, RigError

_BENCHMARKS: dict[str, Callable[[Arena], Coroutine[Any, Any, list[Row]]]] = {
    "create": creating,
    "exec": executing,
    "scale": scaling,
    "history": history,
    "read": reading,
    "volumes": volumes,
}
_RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Returns the exit code: 0 also where a target is missed, unless `--check` is given; 1 where one could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds and less data: shows that it works, no more")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in _BENCHMARKS]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(_BENCHMARKS)}")
    try:
        rows, failed = _run(options.names or list(_BENCHMARKS), quick=options.quick)
    except RigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    missed = options.check and any(row.met is False for row in rows)
    return int(bool(failed) or missed)


def _run(names: Sequence[str], *, quick: bool) -> tuple[list[Row], list[str]]:
    """The rows, and the names of the benchmarks that failed."""
    began = datetime.now(UTC)
    rows: list[Row] = []
    failed: list[str] = []
    # As in production: what etcd says it has is on the disk.
    with Rig(gpus=8, images=(BUSYBOX, GLIBC), etcd_fsync=True) as rig:
        docker = DockerCli(rig)
        facts = machine.facts(rig, docker.version) | {"quick": quick}
        arena = Arena(rig, docker, quick)
        for name in names:
            before = time.monotonic()
            try:
                rows += asyncio.run(_BENCHMARKS[name](arena))
            except (RigError, grpc.RpcError):
                # What the others found is worth keeping.
                traceback.print_exc()
                failed.append(name)
            print(f"{name}: {time.monotonic() - before:.0f} s", file=sys.stderr, flush=True)
    facts |= {"load_after": machine.load(), "failed": failed}
    print(machine.heading(facts), report.table(rows), sep="\n\n")
    saved = _RESULTS / f"{began:%Y-%m-%dT%H%M%S}.json"
    report.save(saved, facts, rows)
    print(f"\nevery sample: {saved}")
    return rows, failed


if __name__ == "__main__":
    sys.exit(main())
