"""Tables and lists of fields as text.

At a terminal they fit its width: columns that may wrap continue on further lines, and nothing is cut off while the
others fit. Anywhere else each row is one line as wide as its content, for any COLUMNS, so that scripts can parse
it. rich is imported only when something is rendered: the command has to start fast.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from gpudock.cli._text import printable

if TYPE_CHECKING:
    from rich.table import Table

_GAP = 2
_UNLIMITED_WIDTH = 1_000_000
_LEAST_WIDTH = 8


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, wrap: Collection[str] = ()) -> str:
    """Return a header line and a line for each row. Columns named in `wrap` give way first in a narrow terminal."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for header in headers:
        grid.add_column(header, no_wrap=header not in wrap, overflow="fold")
    for row in rows:
        grid.add_row(*map(_cell, row))
    return _rendered(grid)


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a line for each name with a value; a value of several lines continues below its first one."""
    from rich.table import Table

    grid = Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            grid.add_row(_cell(f"{name}:"), _cell(value))
    return _rendered(grid)


def stream_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one row of a table whose later rows are not known yet.

    `widths` are those of the columns; at a terminal that is too narrow for them, the widest become narrower.
    """
    from rich.table import Table

    at_terminal = sys.stdout.isatty()
    fitted = _fitted(widths, _terminal_columns()) if at_terminal else widths
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    for width in fitted:
        grid.add_column(overflow="fold", width=width if at_terminal else None, min_width=width)
    grid.add_row(*map(_cell, cells))
    return _rendered(grid)


def _fitted(widths: Sequence[int], columns: int) -> list[int]:
    fitted = list(widths)
    while sum(fitted) + _GAP * len(fitted) > columns and max(fitted) > _LEAST_WIDTH:
        fitted[fitted.index(max(fitted))] -= 1
    return fitted


def _terminal_columns() -> int:
    from rich.console import Console

    return Console(file=sys.stdout).width


def _cell(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _rendered(grid: Table) -> str:
    from rich.console import Console

    console = Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else _UNLIMITED_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
