"""What `make mutants` makes of decorated functions, of verdicts and of explanations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.mutants import report
from tests.mutants.report import Verdict, read_mutants, write_report
from tests.mutants.source import without_decorators

CODE = """
class A:
    @property
    @override
    def size(self) -> int:
        return 1

    @override
    async def look(self) -> int:
        return 2

    @staticmethod
    @override
    def none() -> int:
        return 3

    @cache
    def kept(self) -> int:
        return 4
"""

MUTATED = """def x_f__mutmut_orig(a):
    return a + 1

def x_f__mutmut_1(a):
    return a - 1

def x_f__mutmut_2(a):
    return a + 2
"""


def test_decorated_functions_behave_as_before_and_can_be_mutated() -> None:
    code = without_decorators(CODE)
    assert "override" not in code
    assert "@property" not in code
    names: dict[str, Any] = {"cache": lambda function: function}
    exec(code, names)  # noqa: S102 - our own code
    made = names["A"]()
    assert (made.size, made.none(), made.kept()) == (1, 3, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A room of which one mutant was caught and one survived."""
    (tmp_path / "mutants").mkdir()
    (tmp_path / "mutants" / "m.py").write_text(MUTATED)
    codes = {"m.x_f__mutmut_1": 1, "m.x_f__mutmut_2": 0}
    (tmp_path / "mutants" / "m.py.meta").write_text(json.dumps({"exit_code_by_key": codes}))
    spans = {"x_f__mutmut_orig": [1, 2], "x_f__mutmut_1": [4, 5], "x_f__mutmut_2": [7, 8]}
    (tmp_path / "mutants" / "m.py.spans").write_text(json.dumps({"spans": spans}))
    return tmp_path


def explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: str) -> None:
    file = tmp_path / "explained.toml"
    file.write_text(
        f"[[explained]]\nroom = 'r'\nfunction = 'm:f'\nremoved = 'return a + 1'\nadded = '{added}'\nreason = 'so'\n"
    )
    monkeypatch.setattr(report, "_EXPLAINED", file)


def test_survivors_are_shown_and_count(folder: Path) -> None:
    mutants = read_mutants(folder)
    assert [mutant.verdict for mutant in mutants] == [Verdict.CAUGHT, Verdict.SURVIVED]
    text, problems = write_report("r", mutants, mutants, 85)
    assert "1 caught, 0 timed out, 1 survived" in text
    assert "+    return a + 2" in text
    assert "-    return a - 1" not in text
    assert problems == ["r: 50.0 % of the mutants are caught; at least 85 % must be"]


def test_an_explained_survivor_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explain(folder, monkeypatch, "return a + 2")
    mutants = read_mutants(folder)
    text, problems = write_report("r", mutants, mutants, 85)
    assert "explained: so" in text
    assert not problems


def test_an_explanation_without_a_mutant_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explain(folder, monkeypatch, "return a + 3")
    mutants = read_mutants(folder)
    _, problems = write_report("r", mutants, mutants, 0)
    assert len(problems) == 1
    assert "does not exist" in problems[0]
