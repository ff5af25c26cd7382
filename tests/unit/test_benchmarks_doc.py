"""docs/benchmarks.md shows the figures of its samples, and names the tables without samples."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import document, report
from benchmarks.report import Row, Target, Unit

_MACHINE: dict[str, Any] = {
    "date": "2026-12-01T08:00:00+00:00", "command": "python -m benchmarks exec", "commit": "0123456789ab",
    "quick": False, "cpu": "Example", "cores": 2, "memory_bytes": 25e9, "kernel": "6.1", "filesystem": "ext4",
    "cgroup_version": "2",
    "engine": "20.10.24", "docker_cli": "20.10.24", "etcd": "3.5.21", "etcd_fsync": True, "python": "3.11.7",
    "load_before": [0.1, 0.1, 0.1], "load_after": [2.0, 1.0, 0.5], "failed": [],
}  # fmt: skip
_ROWS = [
    Row("create", Unit.MS, {"gpudock": [100, 110, 300], "docker": [100, 100, 200]}, "docker", target=Target(1.15)),
    Row("get, p99", Unit.MS, {"gpudock": [1, 2, 3.123456]}, percent=99, target=Target(2, unit="ms")),
    Row("disk", Unit.MB, {"gpudock": [0.01], "changed": [0]}, "changed"),
]
# The header of tables with figures.
_HEAD = "| gpudock"


def _document(*names: str) -> str:
    return f"before\n<!-- samples: {' '.join(names)} -->\nold\n<!-- end of samples -->\nafter\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with the results of two runs."""
    report.save(tmp_path / "one.json", _MACHINE, _ROWS)
    report.save(tmp_path / "two.json", _MACHINE | {"quick": True, "failed": ["history"]}, _ROWS[:1])
    return tmp_path


def test_the_document_shows_the_figures_of_its_samples() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert text == document.render(text), "run `python -m benchmarks --render`"


def test_samples_in_the_repository_are_shown() -> None:
    words = ["git", "-C", str(document.RESULTS.parent), "ls-files", "--", document.RESULTS.name]
    kept = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    assert {Path(name).stem for name in kept} == document.shown_results(document.DOCUMENT.read_text(encoding="utf-8"))


def test_named_results_can_be_committed_and_others_are_ignored() -> None:
    def ignored(name: str) -> bool:
        words = ["git", "-C", str(document.RESULTS.parent), "check-ignore", "--quiet", f"results/{name}.json"]
        return subprocess.run(words, check=False).returncode == 0

    assert (ignored("exec"), ignored("2026-12-01T080000")) == (False, True)


def test_tables_without_samples_say_so() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    outside = document.MARKED.sub("", text)
    assert ("**Their samples were not kept**" in outside) == any(
        line.startswith("| what ") and _HEAD in line and "met" in line for line in outside.splitlines()
    )


def test_several_results_are_rendered_with_their_machines(results: Path) -> None:
    text = document.render(_document("one", "two"), results)
    assert text.startswith(
        "before\n<!-- samples: one two -->\n2026-12-01T08:00:00+00:00, `python -m benchmarks exec`, "
    )
    assert text.endswith("|\n\n<!-- end of samples -->\nafter\n")
    assert text.count("commit 0123456789ab:\n2 cores (Example), 25 GB") == 2
    assert text.count("\nhistory could not be measured.\n") == 1
    create, get, disk, quick = (line for line in text.splitlines() if line.startswith(("| create", "| get", "| disk")))
    cells = [cell.strip() for cell in create.split("|")[1:-1]]
    assert cells == ["create", "110 ms", "docker", "100 ms", "1.10 (1.05 to 1.30)", "at most 1.15", "yes"]
    assert [cell.strip() for cell in get.split("|")[2:-1]] == ["3.10 ms", "", "", "", "at most 2 ms", "**no**"]
    assert [cell.strip() for cell in disk.split("|")[2:-1]] == ["0.01 MB", "changed", "0.00 MB", "", "", ""]
    assert quick.split("|")[-2].strip() == "", "a quick run is compared with a target"
    assert document.render(text, results) == text
    assert document.shown_results(text) == {"one", "two"}


def test_a_different_figure_in_the_document_or_the_samples_is_noticed(results: Path) -> None:
    text = document.render(_document("one"), results)
    better = text.replace("110 ms", "10 ms")
    assert document.render(better, results) != better
    report.save(results / "one.json", _MACHINE, [Row("create", Unit.MS, {"gpudock": [90]})])
    assert document.render(text, results) != text


@pytest.mark.parametrize(
    "text",
    [
        _document("three"),
        _document(),
        "before\n<!-- samples: one -->\n",
        "before\n<!-- end of samples -->\n",
        _document("one") + "<!-- samples: one -->\n",
        _document("one").replace("<!-- end of samples -->\n", "<!-- end of samples -->"),
    ],
)
def test_invalid_markers_are_refused(results: Path, text: str) -> None:
    with pytest.raises(document.MarkerError):
        document.render(text, results)


def test_results_that_cannot_be_read_are_refused(results: Path) -> None:
    (results / "one.json").write_text("{}")
    with pytest.raises(document.MarkerError, match="one cannot be read"):
        document.render(_document("one"), results)


def test_saved_results_are_read_as_they_were(results: Path) -> None:
    kept, rows = report.read(results / "one.json")
    assert (kept, rows) == (_MACHINE, _ROWS)
    assert [row.cells for row in rows] == [row.cells for row in _ROWS]
