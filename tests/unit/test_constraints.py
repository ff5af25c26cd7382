"""deploy/constraints.txt: in step with pyproject.toml, hashed throughout, and of no particular index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8")
ENTRIES = [entry for entry in re.split(r"\n(?=[a-z])", TEXT.partition("\n")[2]) if entry]


def test_every_requirement_of_the_daemon_is_pinned_to_a_version_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned: dict[str, set[str]] = {}
    for entry in ENTRIES:
        found = re.match(r"([a-z0-9.-]+)==([^\s;\\]+)", entry)
        assert found, entry[:80]
        pinned.setdefault(found[1], set()).add(found[2])
    for line in (*project["dependencies"], *project["optional-dependencies"]["server"]):
        wanted = Requirement(line)
        versions = pinned.get(wanted.name, set())
        assert versions, f"{wanted.name} is not in deploy/constraints.txt; run scripts/lock-requirements"
        assert all(wanted.specifier.contains(version) for version in versions), f"{line}: {versions}"


def test_every_entry_has_hashes_and_none_names_an_index() -> None:
    assert len(ENTRIES) > 20
    assert [entry[:80] for entry in ENTRIES if "--hash=sha256:" not in entry] == []
    assert "://" not in TEXT
    assert "--index-url" not in TEXT
