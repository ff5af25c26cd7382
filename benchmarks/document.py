"""The tables of docs/benchmarks.md, made from the samples in benchmarks/results/.

Between `<!-- samples: NAME NAME -->` and `<!-- end of samples -->` the document has, for each results/NAME.json, a
heading about the machine, and the table.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import machine, report

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"

MARKED = re.compile(
    r"^<!-- samples: (?P<names>[^\n]*?) -->\n(?P<text>.*?)^<!-- end of samples -->\n", re.DOTALL | re.MULTILINE
)
_BEGIN, _END = "<!-- samples:", "<!-- end of samples -->"


class MarkerError(Exception):
    """The markers of the document are wrong, or the named samples cannot be read."""


def render(text: str, results: Path = RESULTS) -> str:
    """The document with the tables between its markers made from their samples. Raises MarkerError."""
    found = list(MARKED.finditer(text))
    if any(len(found) != text.count(f"\n{mark}") for mark in (_BEGIN, _END)):
        raise MarkerError(f"each {_BEGIN} NAME --> needs one {_END} after it, each on a line of its own")
    return MARKED.sub(lambda match: _block(match["names"], results), text)


def shown_results(text: str) -> set[str]:
    """The names of the results in a document."""
    return {name for match in MARKED.finditer(text) for name in match["names"].split()}


def _block(names: str, results: Path) -> str:
    parts = [_table(name, results / f"{name}.json") for name in names.split()]
    if not parts:
        raise MarkerError(f"{_BEGIN} --> names no results; there should be one NAME at least")
    return f"{_BEGIN} {names} -->\n" + "".join(f"{part}\n" for part in parts) + f"{_END}\n"


def _table(name: str, path: Path) -> str:
    try:
        facts, rows = report.read(path)
        # A quick run has too few rounds to say which targets are met.
        return f"{machine.heading(facts)}\n\n{report.table(rows, judged=not facts['quick'])}\n"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MarkerError(f"the results {name} cannot be read from {path}: {error!r}") from error
