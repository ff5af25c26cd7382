"""Rewrites source code so that mutmut, which does not change decorated functions, changes them too."""

from __future__ import annotations

import ast

# Decorators that are replaced by a call below the function.
_CALLED = {"property", "asynccontextmanager", "contextmanager"}
# Decorators without an effect at runtime.
_NO_EFFECT = {"override"}


def without_decorators(code: str) -> str:
    """`code` of a module in which `@property def f` is `def f` and `f = property(f)`, without `@override`.

    Functions with other decorators, or with a decorator of _CALLED and another one, are unchanged. Line numbers change.
    """
    lines = code.splitlines()
    drop: set[int] = set()
    # Lines to insert after a line, by its number from 1.
    after: dict[int, str] = {}
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = [decorator.id if isinstance(decorator, ast.Name) else "" for decorator in node.decorator_list]
        called = [name for name in names if name in _CALLED]
        if not set(names) <= _CALLED | _NO_EFFECT | {"staticmethod", "classmethod"} or len(called) > 1:
            continue
        if called and len(called) + sum(name in _NO_EFFECT for name in names) < len(names):
            continue
        drop |= {
            decorator.lineno
            for decorator, name in zip(node.decorator_list, names, strict=True)
            if name in _CALLED or name in _NO_EFFECT
        }
        if called:
            assert node.end_lineno is not None
            after[node.end_lineno] = f"{' ' * node.col_offset}{node.name} = {called[0]}({node.name})"
    written: list[str] = []
    for number, line in enumerate(lines, 1):
        if number not in drop:
            written.append(line)
        if number in after:
            written.append(after[number])
    return "\n".join(written) + "\n"
