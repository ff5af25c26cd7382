"""What a run found: rows with their targets, as a table to read and as JSON to keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.rounds import Ratio, Samples


class Unit(StrEnum):
    """What the figures of a row are in."""

    MS = "ms"
    MB = "MB"
    MB_PER_S = "MB/s"


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure must be: at most the bound, or at least."""

    bound: float
    at_least: bool = False
    unit: str = ""

    def met_by(self, figure: float) -> bool:
        """Whether a figure is good enough. Nothing is rounded in its favour."""
        return figure >= self.bound if self.at_least else figure <= self.bound

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}{' ' + self.unit if self.unit else ''}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    The target is for the ratio where there is one, else for `ours`. Without a target the row is there to put the
    others into proportion.
    """

    name: str
    unit: Unit
    ours: float
    against: str = ""
    theirs: float | None = None
    ratio: Ratio | None = None
    target: Target | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None without one."""
        if self.target is None:
            return None
        return self.target.met_by(self.ours if self.ratio is None else self.ratio.median)

    @property
    def cells(self) -> list[str]:
        """What the table shows."""
        verdict = {None: "", True: "yes", False: "**no**"}[self.met]
        return [
            self.name,
            self._figure(self.ours),
            self.against,
            "" if self.theirs is None else self._figure(self.theirs),
            "" if self.ratio is None else str(self.ratio),
            "" if self.target is None else str(self.target),
            verdict,
        ]

    @property
    def record(self) -> dict[str, Any]:
        """What is saved."""
        return asdict(self) | {"met": self.met}

    def _figure(self, value: float) -> str:
        return f"{value:.2f} {self.unit}" if value < 10 else f"{value:.0f} {self.unit}"


def versus(
    samples: Samples, ours: str, theirs: str, *, name: str, unit: Unit, against: str = "", target: Target | None = None
) -> Row:
    """The row that two ways of one comparison make."""
    return Row(
        name=name,
        unit=unit,
        ours=samples.median(ours),
        against=against or theirs,
        theirs=samples.median(theirs),
        ratio=samples.ratio(ours, theirs),
        target=target,
        samples={way: list(samples.by_name[way]) for way in (ours, theirs)},
    )


_HEAD = ["what", "gpudock", "against", "", "ratio (quartiles)", "target", "met"]


def table(rows: Iterable[Row]) -> str:
    """Markdown, aligned to be read as it is."""
    lines = [_HEAD, *(row.cells for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * max(width, 3) for width in widths) + " |")
    return "\n".join(text)


def save(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """Keep a run with every sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": [row.record for row in rows]}, indent=1) + "\n")
