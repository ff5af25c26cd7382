"""Run mutmut in the folder of a group, with changes to its mutations. A program, not a module.

`generate` creates the mutants, `run FILE` tries those that the file names, one at a time. The changes:

- Statements that are a call, or that raise, are removed: mutmut has no such mutation, and a missing check is the most
  important defect.
- Texts of messages (strings with a space, and formatted strings) are not mutated, neither alone nor as an argument. Nor
  are calls of a logger.
- The fastest tests of a mutant run first.
- Tests that hang are killed at their time limit, and after each mutant the processes that its tests left behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import libcst as cst
from mutmut import __main__ as mutmut_main
from mutmut.mutation import mutators
from mutmut.state import state
from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir, setup_source_paths
from mutmut.workers import isolation
from mutmut.workers.isolation import ForkServerRunner

# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# The time in seconds in which a process must end after SIGXCPU.
_GRACE_SECONDS = 2.0


def _is_wording(node: cst.BaseExpression) -> bool:
    match node:
        case cst.SimpleString():
            return " " in node.value
        case cst.FormattedString():
            return True
        case cst.ConcatenatedString():
            return _is_wording(node.left) or _is_wording(node.right)
        case _:
            return False


def _is_log_call(node: cst.BaseExpression) -> bool:
    if isinstance(node, cst.Await):
        return _is_log_call(node.expression)
    return (
        isinstance(node, cst.Call)
        and isinstance(node.func, cst.Attribute)
        and isinstance(node.func.value, cst.Name)
        and node.func.value.value == "log"
    )


def _strings(node: cst.BaseString) -> Iterable[cst.CSTNode]:
    """Yield one mutation of a string instead of three: a test that fails with one fails with all."""
    if not _is_wording(node):
        yield from list(mutators.operator_string(node))[:1]


def _arguments(node: cst.Call) -> Iterable[cst.CSTNode]:
    if _is_log_call(node):
        return
    kept = {id(arg.value) for arg in node.args if _is_wording(arg.value)}
    if not kept:
        yield from mutators.operator_arg_removal(node)
        return
    for mutated in mutators.operator_arg_removal(node):
        if kept <= {id(arg.value) for arg in mutated.args}:
            yield mutated


def _without_statement(node: cst.Expr | cst.Raise) -> Iterable[cst.CSTNode]:
    if isinstance(node, cst.Expr):
        value = node.value.expression if isinstance(node.value, cst.Await) else node.value
        if not isinstance(value, cst.Call) or _is_log_call(value):
            return
    yield cst.Pass()


def _adjust() -> None:
    instead: dict[Any, Any] = {mutators.operator_string: _strings, mutators.operator_arg_removal: _arguments}
    # mutmut declares a sequence. It is a list, which is changed in place, because modules of mutmut have imported it.
    operators: Any = mutators.mutation_operators
    operators[:] = [(kind, instead.get(operator, operator)) for kind, operator in operators]
    operators += [(cst.Expr, _without_statement), (cst.Raise, _without_statement)]
    runner: Any = ForkServerRunner
    submit = runner.submit

    def quickest_first(self: Any, mutant_name: str, tests: list[str], *args: Any) -> None:
        durations = state().duration_by_test
        submit(self, mutant_name, sorted(tests, key=lambda test: (durations.get(test, 0), test)), *args)

    runner.submit = quickest_first
    _kill_what_hangs()


def _kill_what_hangs() -> None:
    """Make the fork server of mutmut enforce timeouts, and kill the processes that a mutant leaves running.

    mutmut does that in a thread, which sends one SIGXCPU to a process id that may have been reused, and does not kill
    child processes.
    """
    deadlines: dict[int, float] = {}
    runner: Any = ForkServerRunner
    timing: Any = isolation
    serve, reap = runner._forkserver_main, runner._reap_children

    def serve_and_adopt(self: Any, work_fd: int, result_fd: int) -> None:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        signal.signal(signal.SIGUSR1, end)
        prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
        # Orphaned processes of a mutant's tests become children of the server.
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
        serve(self, work_fd, result_fd)

    def end(*_: object) -> None:
        kill_children()
        os._exit(0)

    def stop(self: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.forkserver_pid, signal.SIGUSR1)

    def watch(pid: int, timeout_s: float) -> None:
        deadlines[pid] = time.monotonic() + timeout_s

    # The server calls this every second while a mutant is tried, and when a process has ended.
    def reap_and_kill(self: Any, running: dict[int, Any], *args: Any, **kwargs: Any) -> None:
        reap(self, running, *args, **kwargs)
        now = time.monotonic()
        for pid in deadlines.keys() - running.keys():
            del deadlines[pid]
        for pid, deadline in deadlines.items():
            if now > deadline:
                os.kill(pid, signal.SIGKILL if now > deadline + _GRACE_SECONDS else signal.SIGXCPU)
        if not running:
            kill_children()

    runner._forkserver_main = serve_and_adopt
    runner.stop_all_workers = stop
    runner._reap_children = reap_and_kill
    timing.register_timeout = watch


def kill_children() -> None:
    """Kill and wait for all children of this process; as a subreaper it inherits their children, too."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    while pids := [int(pid) for pid in children.read_text().split()]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main() -> int:
    """Run the program; see the docstring of the module. Returns the exit code: 130 if interrupted."""
    _adjust()
    try:
        _act()
    except KeyboardInterrupt:
        return 130
    return 0


def _act() -> None:
    if sys.argv[1] == "generate":
        Path("mutants").mkdir(exist_ok=True)
        copy_src_dir()
        copy_also_copy_files()
        setup_source_paths()
        mutmut_main.create_mutants(1)
    else:
        mutmut_main._run(Path(sys.argv[2]).read_text().split(), 1)  # the command accepts too few names


if __name__ == "__main__":
    sys.exit(main())
