"""Every setting is passed to a daemon by a test.

This shows that a test of a running daemon has the flag of the setting, and not only for a daemon that must not start.
That the setting has an effect is tested in `tests/engine/test_settings_effect.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest
from gpudock_server.settings.definitions import Settings

from tests.unit.assertion_syntax import TESTS

_WITH_DAEMONS = ("engine", "faults", "stateful", "vm")

# The rig passes these to every daemon; no test could reach a daemon that ignores them.
_RIG_FLAGS = {"docker_host", "etcd_endpoints", "socket", "state_dir", "allow_inconsistent_etcd"}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _passed_flags(files: Iterable[Path]) -> set[str]:
    """Return the strings in the code, except those in calls of `startup_error`."""
    found: set[str] = set()
    for path in files:
        module = ast.parse(path.read_text(encoding="utf-8"))
        startup_errors = {
            id(node)
            for call in ast.walk(module)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "startup_error"
            for node in ast.walk(call)
        }
        found |= {
            node.value
            for node in ast.walk(module)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in startup_errors
        }
    return found


def test_every_setting_is_passed_to_a_daemon_by_a_test() -> None:
    passed = _passed_flags(sorted(path for folder in _WITH_DAEMONS for path in (TESTS / folder).rglob("*.py")))
    assert {name for name in Settings.model_fields if _flag(name) not in passed} - _RIG_FLAGS == set()


def test_the_rig_passes_exactly_its_flags() -> None:
    passed = _passed_flags([TESTS / "rig/rig.py"])
    assert {name for name in Settings.model_fields if _flag(name) in passed} == _RIG_FLAGS


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ('daemons.start("--max-execs", "1")', True),
        ('FLAGS = ("--max-execs", "1")', True),
        ('# daemons.start("--max-execs", "1")', False),
        ('"""--max-execs is what this is about."""', False),
        ('daemons.startup_error("--max-execs", "0")', False),
    ],
)
def test_which_strings_count_as_passed(tmp_path: Path, text: str, counts: bool) -> None:  # noqa: FBT001 - a parameter of the test
    path = tmp_path / "test_one.py"
    path.write_text(text)
    assert ("--max-execs" in _passed_flags([path])) == counts
