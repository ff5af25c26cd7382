"""Try the mutants of groups, and write a report on each: `python -m tests.mutants [GROUP...]`; see docs/testing.md."""

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
from tests.mutants.report import Mutant, Outcome, forget, read_mutants, write_report

ROOT = Path(__file__).resolve().parents[2]
# One folder per group; git ignores it.
WORK = ROOT / ".mutants"
_SERVER = ROOT / "server" / "gpudock_server"
# A test that takes longer has failed; the longest test takes one or two seconds.
_TEST_SECONDS = 20
# The time in which mutmut must end after SIGINT.
_END_SECONDS = 10.0
_MUTMUT_RUNNER = Path(__file__).with_name("mutmut_runner.py")


def main() -> int:
    """Returns 1 if a group has less than its minimum or an explanation has no mutant, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="groups of groups.toml (default: all)")
    parser.add_argument("--sample", type=int, default=0, help="try this many of a group's mutants (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the choice of mutants")
    parser.add_argument("--fresh", action="store_true", help="discard the results of earlier runs")
    parser.add_argument("--report", action="store_true", help="try no mutants; report the results of earlier runs")
    options = parser.parse_args()
    groups: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("groups.toml").read_text())
    if unknown := set(options.groups) - groups.keys():
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
    problems: list[str] = []
    for name in options.groups or groups:
        folder = WORK / name.replace("/", "-")
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            chosen = _examine(folder, groups[name], options)
        except Interrupted:
            message = "\ninterrupted; the outcomes so far are kept, and the same command continues from here"
            print(message, file=sys.stderr)  # noqa: T201 - a command line program
            return 130
        mutants = read_mutants(folder)
        text, wrong = write_report(
            name, mutants, [mutant for mutant in mutants if mutant.name in chosen], groups[name].get("minimum", 0)
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(text)
        print(text.splitlines()[0], f"survivors: {folder / 'report.txt'}", sep="\n", flush=True)  # noqa: T201 - its result
        problems += wrong
    print(*problems, sep="\n", file=sys.stderr)  # noqa: T201 - a command line program
    return 1 if problems else 0


class Interrupted(Exception):
    """The run was interrupted by a signal."""


def _examine(folder: Path, group: dict[str, Any], options: argparse.Namespace) -> set[str]:
    """Try mutants of a group, except with `--report`; returns the names of the chosen ones. Raises Interrupted."""
    if options.report:
        return {mutant.name for mutant in _choose(read_mutants(folder), options.sample, options.seed)}
    _prepare(folder, group)
    run(folder, "generate")
    chosen = _choose(read_mutants(folder), options.sample, options.seed)
    _try(folder, chosen)
    return {mutant.name for mutant in chosen}


def _choose(mutants: Sequence[Mutant], sample: int, seed: int) -> list[Mutant]:
    """Return `sample` of the mutants (0: all), the same for the same mutants and `seed`."""
    if not sample or sample >= len(mutants):
        return list(mutants)
    ordered = sorted(mutants, key=lambda mutant: mutant.name)
    return random.Random(seed).sample(ordered, sample)  # noqa: S311 - the choice must be repeatable and is no secret


def _prepare(folder: Path, group: dict[str, Any]) -> None:
    """Write the project that mutmut changes. Unchanged files keep their mtime, by which mutmut recognises them."""
    mutated = {path for pattern in group["files"] for path in _SERVER.glob(pattern)}
    if not mutated:
        raise SystemExit(f"no files match {group['files']} below {_SERVER}")
    required: dict[Path, bytes] = {}
    for path in _SERVER.rglob("*.py"):
        code = path.read_bytes()
        if path in mutated:
            code = without_decorators(code.decode()).encode()
        required[Path("src/gpudock_server") / path.relative_to(_SERVER)] = code
    for path in (ROOT / "tests").rglob("*.py"):
        required[path.relative_to(ROOT)] = path.read_bytes()
    listed = ", ".join(f'"src/gpudock_server/{path.relative_to(_SERVER)}"' for path in sorted(mutated))
    tests = [f"tests/{name}" for name in group["tests"]]
    if missing := [name for name in tests if not (ROOT / name).exists()]:
        raise SystemExit(f"groups.toml names tests that do not exist: {', '.join(missing)}")
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "--timeout", str(_TEST_SECONDS)]
    arguments += ["-k", group.get("keyword", "")]
    required[Path("pyproject.toml")] = (
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
        if kept.relative_to(folder) not in required:
            kept.unlink()
            (folder / "mutants" / kept.relative_to(folder)).unlink(missing_ok=True)
    for path, content in required.items():
        target = folder / path
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _try(folder: Path, chosen: Sequence[Mutant]) -> None:
    """Try the mutants without an outcome; if tests have changed, also those that no test had noticed."""
    digest = hashlib.sha256()
    for path in sorted((folder / "tests").rglob("*.py")):
        digest.update(path.read_bytes())
    recorded = folder / "tests.sha256"
    if not recorded.exists() or recorded.read_text() != digest.hexdigest():
        # mutmut then determines again which tests run which function.
        (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
        again = {Outcome.SURVIVED, Outcome.UNSEEN, Outcome.CRASHED}
        forget(folder, {mutant.name for mutant in read_mutants(folder) if mutant.outcome in again})
        recorded.write_text(digest.hexdigest())
    known = {mutant.name: mutant.outcome for mutant in read_mutants(folder)}
    if names := [mutant.name for mutant in chosen if known[mutant.name] is Outcome.OPEN]:
        todo = folder / "todo.txt"
        todo.write_text("\n".join(names))
        run(folder, "run", todo.name)


def run(folder: Path, *arguments: str) -> None:
    """Run mutmut in its own process group, so that Ctrl-C reaches only this process. Raises Interrupted."""
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
        # mutmut records what it has tried, and ends.
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
    # A background process of a shell ignores SIGINT, and its child processes would too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
