"""The tables of docs/benchmarks.md, which are made from the samples in benchmarks/results/ and from nothing else.

Between `<!-- samples: NAME NAME -->` and `<!-- end of samples -->` stands, for each results/NAME.json, what it was
measured on and its table.
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
    """The document's markers do not say which samples belong where, or there are no such samples."""


def rendered(text: str, results: Path = RESULTS) -> str:
    """The document with the tables between its markers rendered again from their samples. Raises MarkerError."""
    found = list(MARKED.finditer(text))
    if any(len(found) != text.count(f"\n{mark}") for mark in (_BEGIN, _END)):
        raise MarkerError(f"each {_BEGIN} NAME --> needs one {_END} after it, each on a line of its own")
    return MARKED.sub(lambda match: _block(match["names"], results), text)


def shown(text: str) -> set[str]:
    """The names of the results that a document shows."""
    return {name for match in MARKED.finditer(text) for name in match["names"].split()}


def _block(names: str, results: Path) -> str:
    parts = [_table(name, results / f"{name}.json") for name in names.split()]
    if not parts:
        raise MarkerError(f"{_BEGIN} --> names no results; there should be one NAME at least")
    return f"{_BEGIN} {names} -->\n" + "".join(f"{part}\n" for part in parts) + f"{_END}\n"


def _table(name: str, path: Path) -> str:
    try:
        facts, rows = report.read(path)
        # Few rounds show that a benchmark works and nothing else.
        return f"{machine.heading(facts)}\n\n{report.table(rows, judged=not facts['quick'])}\n"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MarkerError(f"the results {name} cannot be read from {path}: {error!r}") from error
