"""Run mutmut in a room's folder, with changes of our own to what it mutates. A program, not a module.

`generate` makes the mutants, `run FILE` tries those that the file names, one at a time. What is changed:

- A statement that is a call, or that raises, is left out: mutmut has no such mutation, and a check that is gone is the
  defect that is sought most.
- The wording of messages (strings with a space in them, and formatted strings) is not mutated, neither as such nor as
  an argument. Nor are calls of a logger.
- The quickest tests of a mutant run first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import libcst as cst
from mutmut import __main__ as mutmut_main
from mutmut.mutation import mutators
from mutmut.state import state
from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir, setup_source_paths
from mutmut.workers.isolation import ForkServerRunner


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
    """One mutation of a string in place of three: what sees a changed string sees it changed in any way."""
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
    mutators.mutation_operators[:] = [  # type: ignore[index]
        (kind, instead.get(operator, operator)) for kind, operator in mutators.mutation_operators
    ]
    mutators.mutation_operators.append((cst.Expr, _without_statement))  # type: ignore[attr-defined]
    mutators.mutation_operators.append((cst.Raise, _without_statement))  # type: ignore[attr-defined]
    submit = ForkServerRunner.submit

    def quickest_first(self: Any, mutant_name: str, tests: list[str], *args: Any) -> None:
        durations = state().duration_by_test
        submit(self, mutant_name, sorted(tests, key=lambda test: (durations.get(test, 0), test)), *args)

    ForkServerRunner.submit = quickest_first  # type: ignore[method-assign, assignment]


def main() -> None:
    """What the module's docstring says."""
    _adjust()
    if sys.argv[1] == "generate":
        Path("mutants").mkdir(exist_ok=True)
        copy_src_dir()
        copy_also_copy_files()
        setup_source_paths()
        mutmut_main.create_mutants(1)
    else:
        mutmut_main._run(Path(sys.argv[2]).read_text().split(), 1)  # the command takes too few names


if __name__ == "__main__":
    main()
