"""What a run found: rows with their targets, as a table to read and as JSON to keep."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.rounds import Ratio, Samples, percentile

_MEDIAN = 50
_SIDES = 2


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
    """One line of the table, of which every figure is made from the samples.

    `samples` are those of gpudock by the name of its way, and then those of what it is compared with, if anything; they
    are kept with five digits, and no figure is made of more. Of gpudock's samples `percent` of 100 are not above the
    figure that is shown. The target is for the ratio where there is one, else for that figure; without a target the row
    is there to put the others into proportion.
    """

    name: str
    unit: Unit
    samples: Mapping[str, Sequence[float]]
    against: str = ""
    percent: int = _MEDIAN
    target: Target | None = None

    def __post_init__(self) -> None:
        """Round the samples to what is kept of them."""
        if not 1 <= len(self.samples) <= _SIDES or not all(self.samples.values()):
            raise ValueError(f"row {self.name!r} needs samples of gpudock, and of one other thing at most")
        kept = {way: [float(f"{sample:.5g}") for sample in samples] for way, samples in self.samples.items()}
        object.__setattr__(self, "samples", kept)

    @property
    def ours(self) -> float:
        """Gpudock's figure."""
        samples = next(iter(self.samples.values()))
        return statistics.median(samples) if self.percent == _MEDIAN else percentile(samples, self.percent)

    @property
    def theirs(self) -> float | None:
        """The median of what it is compared with."""
        return None if len(self.samples) < _SIDES else statistics.median(list(self.samples.values())[1])

    @property
    def ratio(self) -> Ratio | None:
        """Of the two, round by round; None with nothing to compare, or where that was nothing."""
        if len(self.samples) < _SIDES:
            return None
        ours, theirs = self.samples.values()
        return Ratio.of([one / two for one, two in zip(ours, theirs, strict=True)]) if all(theirs) else None

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None without one."""
        if self.target is None:
            return None
        return self.target.met_by(self.ours if self.ratio is None else self.ratio.median)

    @property
    def cells(self) -> list[str]:
        """What the table shows."""
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return [
            self.name,
            self._figure(self.ours),
            self.against,
            "" if self.theirs is None else self._figure(self.theirs),
            "" if self.ratio is None else str(self.ratio),
            "" if self.target is None else str(self.target),
            met,
        ]

    def _figure(self, value: float) -> str:
        return f"{value:.2f} {self.unit}" if value < 10 else f"{value:.0f} {self.unit}"


def versus(
    samples: Samples,
    ours: str,
    theirs: str,
    *,
    name: str,
    unit: Unit,
    against: str = "",
    target: Target | None = None,
) -> Row:
    """The row that two ways of one comparison make."""
    chosen = {way: list(samples.by_name[way]) for way in (ours, theirs)}
    return Row(name=name, unit=unit, samples=chosen, against=against or theirs, target=target)


_HEAD = ["what", "gpudock", "against", "", "ratio (quartiles)", "target", "met"]


def table(rows: Iterable[Row], *, judged: bool = True) -> str:
    """Markdown, aligned to be read as it is; not `judged`, it does not say which targets were met."""
    lines = [_HEAD, *([*row.cells[:-1], row.cells[-1] if judged else ""] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * max(width, 3) for width in widths) + " |")
    return "\n".join(text)


def save(path: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Keep a run with every sample, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"machine": {json.dumps(machine, indent=1)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What `save` has written. Raises OSError; ValueError, KeyError and TypeError for anything else."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for fields in kept["rows"]:
        target = fields.pop("target")
        rows.append(Row(**fields | {"unit": Unit(fields["unit"]), "target": Target(**target) if target else None}))
    return kept["machine"], rows
