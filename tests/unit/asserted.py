"""What tests assert, read from their syntax: the texts and names that an expected value is made of."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]

# Fail unless what they are given comes to be.
_EXPECTING = frozenset({"found", "logged", "raises"})


@dataclass(frozen=True)
class Asserted:
    """One asserted expression: its texts, names and attributes, and those of the variables in it."""

    words: frozenset[str]

    def says(self, prefix: str, value: str, *marks: str) -> bool:
        """Whether it has a value by its name in the contract, or alone where it also has one of the words `marks`."""
        return prefix + value in self.words or (value in self.words and not self.words.isdisjoint(marks))


def asserted_in(files: Collection[Path]) -> list[Asserted]:
    """All that the files assert to be so.

    Counted are `assert`, without its message; and the arguments of `pytest.raises` and of helpers that fail unless they
    find what they are given. Variables stand for what is assigned to them in the same function or module, by loops and
    by `parametrize` too. Not counted is what is denied (`not`, `!=`, `not in`), and what may be one of several
    (`in (A, B)`, `or`), since none of these shows that the value occurs.
    """
    return [each for path in files for each in _of_module(ast.parse(path.read_text(encoding="utf-8")))]


def words_of(node: ast.AST) -> frozenset[str]:
    """The texts, names and attributes below a node."""
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


def _of_module(module: ast.Module) -> Iterator[Asserted]:
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    constants = _assigned(node for statement in module.body for node in _outside_functions(statement))
    for function in functions:
        variables = constants | _assigned(ast.walk(function)) | _parameters(function)
        for node in ast.walk(function):
            for expression in _expected(node):
                yield Asserted(_resolved(_positive(expression), variables))


def _outside_functions(statement: ast.stmt) -> Iterator[ast.AST]:
    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield from ast.walk(statement)


def _expected(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Assert):
        yield node.test
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _EXPECTING:
            # With the helper's name, which says what its arguments are.
            yield ast.Tuple([node.func, *node.args, *(keyword.value for keyword in node.keywords)], ast.Load())


def _positive(expression: ast.expr) -> frozenset[str]:
    """The words of an expression, less those that it denies and those of which any one is enough."""
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
    """The words of what is assigned to each variable."""
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
        for name in (each.id for one in targets for each in ast.walk(one) if isinstance(each, ast.Name)):
            variables[name] = variables.get(name, frozenset()) | words_of(value)
    return variables


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, frozenset[str]]:
    """What `parametrize` gives: all of its values, to each of its names."""
    variables: dict[str, frozenset[str]] = {}
    for decorator in function.decorator_list:
        match decorator:
            case ast.Call(func=ast.Attribute(attr="parametrize"), args=[names, values, *_]):
                each = words_of(names)
                for name in (part.strip() for one in each for part in one.split(",")):
                    variables[name] = variables.get(name, frozenset()) | words_of(values)
            case _:
                continue
    return variables


def _resolved(words: frozenset[str], variables: dict[str, frozenset[str]]) -> frozenset[str]:
    """With the words of the variables among them, of the variables in these, and so on."""
    seen: frozenset[str] = frozenset()
    while new := words - seen:
        seen |= new
        words |= frozenset().union(*(variables.get(word, frozenset()) for word in new))
    return words
