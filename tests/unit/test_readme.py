"""Documents: their make targets and links exist, and README.zh-CN.md matches README.md."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
_PAGES = [
    "README.md",
    "README.zh-CN.md",
    "deploy/README.md",
    *(f"docs/{path.name}" for path in (_REPOSITORY / "docs").glob("*.md")),
]
_TARGETS = set(re.findall(r"^([a-z-]+):", (_REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@dataclass(frozen=True)
class Page:
    """The headings, code and links of a page of Markdown."""

    headings: list[int]
    blocks: list[tuple[str, list[str]]]
    spans: Counter[str]
    links: list[str]

    @classmethod
    def read(cls, name: str) -> Page:
        """Read a page of the repository."""
        text = (_REPOSITORY / name).read_text(encoding="utf-8")
        fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
        prose = fence.sub("", text)
        return cls(
            headings=[len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
            blocks=[(kind, body.splitlines()) for kind, body in fence.findall(text)],
            spans=Counter(re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)),
            links=re.findall(r"\]\(([^)]+)\)", prose),
        )

    @property
    def commands(self) -> list[list[str]]:
        """The blocks of code without comments; of a drawing only its number of lines."""
        return [
            [str(len(lines))] if kind == "text" else [re.sub(r"\s+# .*", "", line) for line in lines]
            for kind, lines in self.blocks
        ]

    @property
    def make_targets(self) -> set[str]:
        """The targets of `make` in its code."""
        code = [*self.spans, *(line for kind, lines in self.blocks if kind == "sh" for line in lines)]
        return {found[1] for line in code if (found := re.match(r" *(?:\w+=\S+ +)*make +([a-z-]+)", line))}


@pytest.mark.parametrize("name", _PAGES)
def test_make_targets_exist(name: str) -> None:
    assert Page.read(name).make_targets - _TARGETS == set()


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_names_the_targets_that_a_reader_needs(name: str) -> None:
    assert Page.read(name).make_targets >= {"demo", "test", "install", "uninstall", "wheel"}


@pytest.mark.parametrize("name", _PAGES)
def test_links_lead_to_files(name: str) -> None:
    folder = (_REPOSITORY / name).parent
    paths = [link.partition("#")[0] for link in Page.read(name).links if "://" not in link]
    assert [path for path in paths if path and not (folder / path).exists()] == []


def test_the_chinese_readme_matches_the_english_one() -> None:
    english, chinese = Page.read("README.md"), Page.read("README.zh-CN.md")
    assert chinese.headings == english.headings
    assert [kind for kind, _ in chinese.blocks] == [kind for kind, _ in english.blocks]
    assert chinese.commands == english.commands
    assert chinese.spans == english.spans
    # The first link of each leads to the other; all others are the same.
    assert (english.links[0], chinese.links[0]) == ("README.zh-CN.md", "README.md")
    assert Counter(chinese.links[1:]) == Counter(english.links[1:])
