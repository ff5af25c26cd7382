"""The words of asserted expressions, read from the syntax of tests."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]

# Helpers that fail unless they find what their arguments describe.
_EXPECTING = frozenset({"wait_for_drift", "wait_for_drift_log", "expect_drift", "raises"})


@dataclass(frozen=True)
class AssertedExpression:
    """The strings, names and attributes of an asserted expression, and of the variables in it."""

    words: frozenset[str]

    def names(self, prefix: str, value: str, *context: str) -> bool:
        """Return whether it has the full name of a value, or the value alone with one of the words `context`."""
        return prefix + value in self.words or (value in self.words and not self.words.isdisjoint(context))


def asserted_expressions(files: Collection[Path]) -> list[AssertedExpression]:
    """Return what files assert to be equal, contained or raised.

    These are `assert` without its message, and the arguments of `pytest.raises` and of the helpers in `_EXPECTING`. A
    variable has the words of what is assigned to it in the same function or module, also by loops and `parametrize`.
    Negations (`not`, `!=`, `not in`) and alternatives (`in (A, B)`, `or`) do not count, since they do not show that the
    value occurs.
    """
    return [each for path in files for each in _of_module(ast.parse(path.read_text(encoding="utf-8")))]


def words_of(node: ast.AST) -> frozenset[str]:
    """Return the strings, names and attributes below a node of the syntax tree."""
    return frozenset(
        word
        for each in ast.walk(node)
        for word in (
            each.value if isinstance(each, ast.Constant) else None,
            each.id if isinstance(each, ast.Name) else None,
            each.attr if isinstance(each, ast.Attribute) else None,
        )
        if isinstance(word, str)
    )


def _of_module(module: ast.Module) -> Iterator[AssertedExpression]:
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    constants = _assigned(node for statement in module.body for node in _outside_functions(statement))
    for function in functions:
        variables = constants | _assigned(ast.walk(function)) | _parameters(function)
        for node in ast.walk(function):
            for expression in _expected(node):
                yield AssertedExpression(_resolved(_positive(expression), variables))


def _outside_functions(statement: ast.stmt) -> Iterator[ast.AST]:
    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield from ast.walk(statement)


def _expected(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Assert):
        yield node.test
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _EXPECTING:
            # With the name of the helper, which is a word of the expression too.
            yield ast.Tuple([node.func, *node.args, *(keyword.value for keyword in node.keywords)], ast.Load())


def _positive(expression: ast.expr) -> frozenset[str]:
    """Return the words of an expression without its negations and alternatives."""
    match expression:
        case ast.UnaryOp(op=ast.Not()) | ast.BoolOp(op=ast.Or()):
            return frozenset()
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            if any(isinstance(op, ast.NotEq | ast.NotIn | ast.IsNot) for op in ops):
                return frozenset()
            if any(isinstance(op, ast.In) for op in ops):
                return words_of(left)
            return frozenset().union(*(words_of(each) for each in (left, *comparators)))
        case ast.BoolOp(values=values):
            return frozenset().union(*(_positive(each) for each in values))
    return words_of(expression)


def _assigned(nodes: Iterator[ast.AST]) -> dict[str, frozenset[str]]:
    """Return the words of what is assigned to each variable."""
    variables: dict[str, frozenset[str]] = {}
    for node in nodes:
        match node:
            case ast.Assign(targets=targets, value=value):
                pass
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                targets = [target]
            case ast.For(target=target, iter=value) | ast.AsyncFor(target=target, iter=value):
                targets = [target]
            case _:
                continue
        for name in (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)):
            variables[name] = variables.get(name, frozenset()) | words_of(value)
    return variables


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, frozenset[str]]:
    """Return the words of the values of `parametrize`, for each of its names."""
    variables: dict[str, frozenset[str]] = {}
    for decorator in function.decorator_list:
        match decorator:
            case ast.Call(func=ast.Attribute(attr="parametrize"), args=[names, values, *_]):
                each = words_of(names)
                for name in (part.strip() for text in each for part in text.split(",")):
                    variables[name] = variables.get(name, frozenset()) | words_of(values)
            case _:
                continue
    return variables


def _resolved(words: frozenset[str], variables: dict[str, frozenset[str]]) -> frozenset[str]:
    """Return words with the words of the variables among them, and so on."""
    resolved: frozenset[str] = frozenset()
    while new := words - resolved:
        resolved |= new
        words |= frozenset().union(*(variables.get(word, frozenset()) for word in new))
    return words
