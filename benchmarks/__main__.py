"""`python -m benchmarks [--quick] [--check] [--save NAME] [BENCHMARK…]`: measure, print the table and save samples.

`python -m benchmarks --render`: write the tables of docs/benchmarks.md from the saved samples.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import grpc

from benchmarks import document, machine, report
from benchmarks.create_latency import measure_create
from benchmarks.docker_cli import DockerCli
from benchmarks.environment import Environment
from benchmarks.exec_throughput import measure_exec
from benchmarks.history_cost import measure_history
from benchmarks.read_latency import measure_reads
from benchmarks.report import Row
from benchmarks.scale_downtime import measure_scale
from benchmarks.volume_costs import measure_volumes
from tests.rig import BUSYBOX, GLIBC, Rig, RigError

_BENCHMARKS: dict[str, Callable[[Environment], Coroutine[Any, Any, list[Row]]]] = {
    "create": measure_create,
    "exec": measure_exec,
    "scale": measure_scale,
    "history": measure_history,
    "read": measure_reads,
    "volumes": measure_volumes,
}
_SAVED = re.compile(r"[a-z][a-z0-9-]*")


def main() -> int:
    """Returns the exit code: 1 if a benchmark could not run or, with `--check`, if a target is missed; else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compare gpudock with the docker command line."
    )
    parser.add_argument("names", nargs="*", metavar="BENCHMARK", help=f"of {', '.join(_BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds and less data, to test the benchmarks")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument(
        "--save",
        metavar="NAME",
        help="save the samples as results/NAME.json, to be committed (default: named by the time, ignored by git)",
    )
    parser.add_argument("--render", action="store_true", help="only rewrite the tables of docs/benchmarks.md")
    options = parser.parse_args()
    if options.render:
        return _render()
    if options.save is not None and not _SAVED.fullmatch(options.save):
        parser.error(f"--save {options.save}: must be letters a-z, digits and dashes, a letter first")
    if unknown := [name for name in options.names if name not in _BENCHMARKS]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(_BENCHMARKS)}")
    try:
        rows, failed = _run(options.names, quick=options.quick, save=options.save)
    except RigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    missed = options.check and any(row.met is False for row in rows)
    return int(bool(failed) or missed)


def _render() -> int:
    try:
        text = document.render(document.DOCUMENT.read_text(encoding="utf-8"))
    except document.MarkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    document.DOCUMENT.write_text(text, encoding="utf-8")
    return 0


def _run(names: Sequence[str], *, quick: bool, save: str | None) -> tuple[list[Row], list[str]]:
    """Run benchmarks; returns the rows, and the names of the benchmarks that failed."""
    began = datetime.now(UTC)
    rows: list[Row] = []
    failed: list[str] = []
    # As in production, etcd syncs its files.
    with Rig(gpus=8, images=(BUSYBOX, GLIBC), etcd_fsync=True) as rig:
        docker = DockerCli(rig)
        words = ["python", "-m", "benchmarks", *(["--quick"] if quick else []), *names]
        facts = machine.facts(rig, docker.version) | {"command": " ".join(words), "quick": quick}
        environment = Environment(rig, docker, quick)
        for name in names or _BENCHMARKS:
            before = time.monotonic()
            try:
                rows += asyncio.run(_BENCHMARKS[name](environment))
            except (RigError, grpc.RpcError):
                # The samples of the other benchmarks are saved.
                traceback.print_exc()
                failed.append(name)
            print(f"{name}: {time.monotonic() - before:.0f} s", file=sys.stderr, flush=True)
    facts |= {"load_after": machine.load(), "failed": failed}
    print(machine.heading(facts), report.table(rows), sep="\n\n")
    saved = document.RESULTS / f"{save or format(began, '%Y-%m-%dT%H%M%S')}.json"
    report.save(saved, facts, rows)
    print(f"\nevery sample: {saved}")
    return rows, failed


if __name__ == "__main__":
    sys.exit(main())
