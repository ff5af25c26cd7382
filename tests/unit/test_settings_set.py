"""Every setting is given to a daemon by some test.

What this shows: a test of a running daemon has the setting's flag in a call or in a list of flags, other than for a
daemon that must not start. What it does not show: that the test would notice if the setting had no effect; those of
`tests/engine/test_settings_effect.py` are there for that.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest
from gpudock_server.settings.definitions import Settings

from tests.unit.asserted import TESTS

_WITH_DAEMONS = ("engine", "faults", "stateful", "vm")

# The rig gives these to every daemon that it starts, and no test could reach one that ignored them.
_OF_THE_RIG = {"docker_host", "etcd_endpoints", "socket", "state_dir", "allow_inconsistent_etcd"}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flags_given(files: Iterable[Path]) -> set[str]:
    """Texts that are flags, but for those in calls of `refused`."""
    found: set[str] = set()
    for path in files:
        module = ast.parse(path.read_text(encoding="utf-8"))
        refused = {
            id(node)
            for call in ast.walk(module)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "refused"
            for node in ast.walk(call)
        }
        found |= {
            node.value
            for node in ast.walk(module)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in refused
        }
    return found


def test_every_setting_is_given_to_a_daemon_by_a_test() -> None:
    given = _flags_given(sorted(path for folder in _WITH_DAEMONS for path in (TESTS / folder).rglob("*.py")))
    assert {name for name in Settings.model_fields if _flag(name) not in given} - _OF_THE_RIG == set()


def test_the_rig_gives_what_it_is_said_to_give() -> None:
    given = _flags_given([TESTS / "rig/rig.py"])
    assert {name for name in Settings.model_fields if _flag(name) in given} == _OF_THE_RIG


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ('own.start("--max-execs", "1")', True),
        ('FLAGS = ("--max-execs", "1")', True),
        ('# own.start("--max-execs", "1")', False),
        ('"""--max-execs is what this is about."""', False),
        ('own.refused("--max-execs", "0")', False),
    ],
)
def test_what_counts_as_given(tmp_path: Path, text: str, counts: bool) -> None:  # noqa: FBT001 - a parameter of the test
    path = tmp_path / "test_one.py"
    path.write_text(text)
    assert ("--max-execs" in _flags_given([path])) == counts
