"""The results of a run: rows with their targets, as a table, and as JSON with all samples."""

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
    """The unit of the figures of a row."""

    MS = "ms"
    MB = "MB"
    MB_PER_S = "MB/s"


@dataclass(frozen=True, slots=True)
class Target:
    """The bound of a figure: a maximum, or with `at_least` a minimum."""

    bound: float
    at_least: bool = False
    unit: str = ""

    def met_by(self, figure: float) -> bool:
        """Whether a figure meets the target. It is not rounded."""
        return figure >= self.bound if self.at_least else figure <= self.bound

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}{' ' + self.unit if self.unit else ''}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table; all figures are computed from the samples.

    `samples` are those of gpudock and, if the row compares, those of the other side, by name. They are rounded to five
    digits. The figure of gpudock is the `percent`-th percentile of its samples. The target is for the ratio if there is
    one, else for that figure; a row without a target is only for comparison.
    """

    name: str
    unit: Unit
    samples: Mapping[str, Sequence[float]]
    against: str = ""
    percent: int = _MEDIAN
    target: Target | None = None

    def __post_init__(self) -> None:
        """Round the samples. Raises ValueError for a wrong number of sides, or a side without samples."""
        if not 1 <= len(self.samples) <= _SIDES or not all(self.samples.values()):
            raise ValueError(f"row {self.name!r} needs samples of gpudock, and of one other thing at most")
        kept = {way: [float(f"{sample:.5g}") for sample in samples] for way, samples in self.samples.items()}
        object.__setattr__(self, "samples", kept)

    @property
    def figure(self) -> float:
        """The figure of gpudock."""
        samples = next(iter(self.samples.values()))
        return statistics.median(samples) if self.percent == _MEDIAN else percentile(samples, self.percent)

    @property
    def other_figure(self) -> float | None:
        """The median of the other side; None without one."""
        return None if len(self.samples) < _SIDES else statistics.median(list(self.samples.values())[1])

    @property
    def ratio(self) -> Ratio | None:
        """The ratio of both sides, round by round; None without another side, or if one of its samples is 0."""
        if len(self.samples) < _SIDES:
            return None
        first, second = self.samples.values()
        if not all(second):
            return None
        return Ratio.of([sample / other for sample, other in zip(first, second, strict=True)])

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.target.met_by(self.figure if self.ratio is None else self.ratio.median)

    @property
    def cells(self) -> list[str]:
        """The cells of the table."""
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return [
            self.name,
            self._figure(self.figure),
            self.against,
            "" if self.other_figure is None else self._figure(self.other_figure),
            "" if self.ratio is None else str(self.ratio),
            "" if self.target is None else str(self.target),
            met,
        ]

    def _figure(self, value: float) -> str:
        return f"{value:.2f} {self.unit}" if value < 10 else f"{value:.0f} {self.unit}"


def versus(
    samples: Samples,
    side: str,
    other: str,
    *,
    name: str,
    unit: Unit,
    against: str = "",
    target: Target | None = None,
) -> Row:
    """The row of two sides of a comparison."""
    chosen = {way: list(samples.by_name[way]) for way in (side, other)}
    return Row(name=name, unit=unit, samples=chosen, against=against or other, target=target)


_HEAD = ["what", "gpudock", "against", "", "ratio (quartiles)", "target", "met"]


def table(rows: Iterable[Row], *, judged: bool = True) -> str:
    """An aligned Markdown table. Without `judged`, it does not say which targets are met."""
    lines = [_HEAD, *([*row.cells[:-1], row.cells[-1] if judged else ""] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * max(width, 3) for width in widths) + " |")
    return "\n".join(text)


def save(path: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Save a run with all samples, one row per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"machine": {json.dumps(machine, indent=1)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read what `save` has written. Raises OSError; ValueError, KeyError and TypeError for other content."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for fields in kept["rows"]:
        target = fields.pop("target")
        rows.append(Row(**fields | {"unit": Unit(fields["unit"]), "target": Target(**target) if target else None}))
    return kept["machine"], rows
