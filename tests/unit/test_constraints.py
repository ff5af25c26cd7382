"""The pinned packages of deploy/ match pyproject.toml, have hashes, and name no index."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DAEMON, BUILD = "constraints.txt", "build-constraints.txt"


def read(name: str) -> str:
    """Return the content of a file of deploy/."""
    return (ROOT / "deploy" / name).read_text(encoding="utf-8")


def entries(name: str) -> list[str]:
    """Return the packages of a file, each with its hashes."""
    return [entry for entry in re.split(r"\n(?=[a-z])", read(name).partition("\n")[2]) if entry]


def require_pinned(lines: Iterable[str], name: str) -> None:
    """Fail unless each requirement is in the file, in a version that it allows."""
    pinned: dict[str, set[str]] = {}
    for entry in entries(name):
        found = re.match(r"([a-z0-9.-]+)==([^\s;\\]+)", entry)
        assert found, entry[:80]
        pinned.setdefault(found[1], set()).add(found[2])
    for line in lines:
        requirement = Requirement(line)
        versions = pinned.get(requirement.name, set())
        assert versions, f"{requirement.name} is not in deploy/{name}; run scripts/lock-requirements"
        assert all(requirement.specifier.contains(version) for version in versions), f"{line}: {versions}"


def test_every_requirement_of_the_daemon_is_pinned_to_an_allowed_version() -> None:
    project = PYPROJECT["project"]
    require_pinned((*project["dependencies"], *project["optional-dependencies"]["server"]), DAEMON)


def test_every_requirement_of_the_build_is_pinned_to_an_allowed_version() -> None:
    require_pinned(PYPROJECT["build-system"]["requires"], BUILD)


@pytest.mark.parametrize(("name", "at_least"), [(DAEMON, 20), (BUILD, 5)])
def test_every_entry_has_hashes_and_no_index(name: str, at_least: int) -> None:
    assert len(entries(name)) > at_least
    assert [entry[:80] for entry in entries(name) if "--hash=sha256:" not in entry] == []
    assert "://" not in read(name)
    assert "--index-url" not in read(name)
