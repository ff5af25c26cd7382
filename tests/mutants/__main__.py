"""Try the mutants of rooms, and write a report on each: `python -m tests.mutants [ROOM...]`; see docs/testing.md."""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.mutants.decorators import without_decorators
from tests.mutants.report import Mutant, Verdict, forget, read_mutants, write_report

ROOT = Path(__file__).resolve().parents[2]
# Ignored by git; a folder for each room.
WORK = ROOT / ".mutants"
_SERVER = ROOT / "server" / "gpudock_server"
# A test that takes longer has failed: the longest of them needs one or two.
_TEST_SECONDS = 20
# What mutmut has to end in.
_END_SECONDS = 10.0
_MUTMUT_RUNNER = Path(__file__).with_name("mutmut_runner.py")


def main() -> int:
    """Returns 1 if a room has less than its minimum or an explanation has no mutant, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help="rooms of rooms.toml (default: all)")
    parser.add_argument("--sample", type=int, default=0, help="try this many of a room's mutants (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="which these are")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--report", action="store_true", help="try none; report on what earlier runs found")
    options = parser.parse_args()
    rooms: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("rooms.toml").read_text())
    if unknown := set(options.rooms) - rooms.keys():
        parser.error(f"no room {', '.join(sorted(unknown))}; there are {', '.join(rooms)}")
    problems: list[str] = []
    for name in options.rooms or rooms:
        folder = WORK / name.replace("/", "-")
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            chosen = _examine(folder, rooms[name], options)
        except Interrupted:
            told = "\ninterrupted; the verdicts so far are kept, and the same command continues from here"
            print(told, file=sys.stderr)  # noqa: T201 - a command line program
            return 130
        mutants = read_mutants(folder)
        text, wrong = write_report(
            name, mutants, [mutant for mutant in mutants if mutant.name in chosen], rooms[name].get("minimum", 0)
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(text)
        print(text.splitlines()[0], f"survivors: {folder / 'report.txt'}", sep="\n", flush=True)  # noqa: T201 - its result
        problems += wrong
    print(*problems, sep="\n", file=sys.stderr)  # noqa: T201 - a command line program
    return 1 if problems else 0


class Interrupted(Exception):
    """The run was asked to stop."""


def _examine(folder: Path, room: dict[str, Any], options: argparse.Namespace) -> set[str]:
    """Try mutants of a room, unless only a report is asked for; the names of those chosen. Raises Interrupted."""
    if options.report:
        return {mutant.name for mutant in _choose(read_mutants(folder), options.sample, options.seed)}
    _prepare(folder, room)
    run(folder, "generate")
    chosen = _choose(read_mutants(folder), options.sample, options.seed)
    _try(folder, chosen)
    return {mutant.name for mutant in chosen}


def _choose(mutants: Sequence[Mutant], sample: int, seed: int) -> list[Mutant]:
    """`sample` of them (0: all), the same ones for the same mutants and `seed`."""
    if not sample or sample >= len(mutants):
        return list(mutants)
    ordered = sorted(mutants, key=lambda mutant: mutant.name)
    return random.Random(seed).sample(ordered, sample)  # noqa: S311 - a choice that can be repeated, and no secret


def _prepare(folder: Path, room: dict[str, Any]) -> None:
    """Write the project that mutmut works on; what has not changed keeps its time, by which mutmut knows it."""
    mutated = {path for pattern in room["files"] for path in _SERVER.glob(pattern)}
    if not mutated:
        raise SystemExit(f"no files match {room['files']} below {_SERVER}")
    wanted: dict[Path, bytes] = {}
    for path in _SERVER.rglob("*.py"):
        code = path.read_bytes()
        if path in mutated:
            code = without_decorators(code.decode()).encode()
        wanted[Path("src/gpudock_server") / path.relative_to(_SERVER)] = code
    for path in (ROOT / "tests").rglob("*.py"):
        wanted[path.relative_to(ROOT)] = path.read_bytes()
    listed = ", ".join(f'"src/gpudock_server/{path.relative_to(_SERVER)}"' for path in sorted(mutated))
    tests = [f"tests/{name}" for name in room["tests"]]
    if missing := [name for name in tests if not (ROOT / name).exists()]:
        raise SystemExit(f"rooms.toml names tests that do not exist: {', '.join(missing)}")
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "--timeout", str(_TEST_SECONDS)]
    arguments += ["-k", room.get("keyword", "")]
    wanted[Path("pyproject.toml")] = (
        (ROOT / "pyproject.toml").read_text()
        + f"""
[tool.mutmut]
source_paths = ["src"]
only_mutate = [{listed}]
do_not_mutate_patterns = ['\\blog\\.']
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = {arguments}
process_isolation = "forkserver"
timeout_constant = 10.0
timeout_multiplier = 2.0
use_git_change_detection = false
on_dependency_change = "ignore"
"""
    ).encode()
    for kept in [path for path in folder.rglob("*.py") if "mutants" not in path.relative_to(folder).parts[:1]]:
        if kept.relative_to(folder) not in wanted:
            kept.unlink()
            (folder / "mutants" / kept.relative_to(folder)).unlink(missing_ok=True)
    for path, content in wanted.items():
        target = folder / path
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _try(folder: Path, chosen: Sequence[Mutant]) -> None:
    """Try those that have no verdict; where tests have changed, also those that no test had noticed."""
    digest = hashlib.sha256()
    for path in sorted((folder / "tests").rglob("*.py")):
        digest.update(path.read_bytes())
    seen = folder / "tests.sha256"
    if not seen.exists() or seen.read_text() != digest.hexdigest():
        # mutmut finds out again which tests run which function.
        (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
        again = {Verdict.SURVIVED, Verdict.UNSEEN, Verdict.CRASHED}
        forget(folder, {mutant.name for mutant in read_mutants(folder) if mutant.verdict in again})
        seen.write_text(digest.hexdigest())
    known = {mutant.name: mutant.verdict for mutant in read_mutants(folder)}
    if names := [mutant.name for mutant in chosen if known[mutant.name] is Verdict.OPEN]:
        todo = folder / "todo.txt"
        todo.write_text("\n".join(names))
        run(folder, "run", todo.name)


def run(folder: Path, *arguments: str) -> None:
    """Run mutmut in a process group of its own, so that Ctrl-C reaches this process alone. Raises Interrupted."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
    with (folder / "mutmut.log").open("a") as output:
        program = subprocess.Popen(
            [sys.executable, str(_MUTMUT_RUNNER), *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
        )
    try:
        code = program.wait()
    except KeyboardInterrupt:
        # It ends with a record of what it has tried.
        program.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            program.wait(_END_SECONDS)
        raise Interrupted from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()
    if code:
        raise SystemExit(f"mutmut ended with exit code {code}; see {output.name}")


if __name__ == "__main__":
    # What a shell runs in the background ignores SIGINT, and so would all that this starts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
