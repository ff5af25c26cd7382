"""Finds words that docs/style.md does not allow: `python -m tests.words`, as part of `make lint`.

words.toml has the words, what to write instead, the files that are checked, and exceptions with their reasons.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
# `WatchTidings` and `no_tidings` have the word `tidings` in them.
_PARTS_OF_NAMES = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|_")
# What stands between two words of one sentence: spaces, or a line break with the mark of a comment.
_BETWEEN_WORDS = r"(?:[ \t]+|[ \t\"]*\n[ \t\"]*(?:(?:#|//|>)[ \t]*)?)"


@dataclass(frozen=True)
class WordException:
    """Where a word is allowed: in files that match a pattern, and there only in lines with `text`, if it has one."""

    word: str
    files: str
    reason: str
    text: str = ""

    def allows(self, word: str, path: str, line: str) -> bool:
        """Whether it applies to this word in this line."""
        return word == self.word and fnmatch(path, self.files) and self.text in line


@dataclass(frozen=True)
class Rules:
    """The content of words.toml. `instead` has the words as regular expressions in lower case."""

    instead: Mapping[str, str]
    exceptions: tuple[WordException, ...] = ()
    used: set[WordException] = field(default_factory=set)

    def findings(self, path: str, text: str) -> Iterator[str]:
        """Each forbidden word of a file as `file:line: "word": what to write instead`; line 0 is the file's name."""
        lines = [path, *text.splitlines()]
        searched = _PARTS_OF_NAMES.sub(" ", "\n".join(lines)).lower()
        for word, instead in self.instead.items():
            for found in re.finditer(rf"\b(?:{word.replace(' ', _BETWEEN_WORDS)})\b", searched):
                number = searched.count("\n", 0, found.start())
                if allowed := [each for each in self.exceptions if each.allows(word, path, lines[number])]:
                    self.used.update(allowed)
                else:
                    yield f'{path}:{number}: "{re.sub(r"[^a-z]+", " ", found[0])}": {instead}'


def read_rules() -> tuple[Rules, list[str]]:
    """The rules of words.toml, and the patterns of git for the files that are checked."""
    data = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    exceptions = tuple(WordException(**each) for each in data["exceptions"])
    return Rules(data["instead"], exceptions), data["files"]


def check(rules: Rules, files: Iterable[str]) -> list[str]:
    """What is wrong in these files of the repository; also names exceptions that apply to nothing any more."""
    problems: list[str] = []
    for path in files:
        text = (ROOT / path).read_text(encoding="utf-8")
        if path == "CHANGELOG.md":  # what a release has said stays as it was
            text = "\n## ".join(text.split("\n## ")[:2])
        problems += rules.findings(path, text)
    unused = (each for each in rules.exceptions if each not in rules.used)
    return problems + [f'tests/words.toml: exception "{each.word}" in {each.files} is not needed' for each in unused]


def main() -> int:
    """Prints what is wrong; returns 1 if anything is."""
    rules, patterns = read_rules()
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    files = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    problems = check(rules, [path for path in files if (ROOT / path).is_file()])
    print("\n".join(problems) or f"words: {len(files)} files are clean")  # noqa: T201 - a command line program
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
