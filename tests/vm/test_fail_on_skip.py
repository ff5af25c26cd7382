"""A run with skipped tests, or without tests, does not succeed, which `make test-vm` relies on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.rig import REPOSITORY

pytestmark = pytest.mark.deep

SOME = """
import pytest


def test_passed():
    pass


def test_skipped():
    pytest.skip("a requirement is missing")
"""


@pytest.mark.parametrize(("chosen", "code"), [("passed", 0), ("test", 1), ("skipped", 1), ("nothing", 5)])
def test_a_run_succeeds_only_if_all_selected_tests_ran(tmp_path: Path, chosen: str, code: int) -> None:
    (tmp_path / "test_some.py").write_text(SOME)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "tests.vm.fail_on_skip", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*words, "-k", chosen], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == code, done.stdout
    assert ("1 skipped; no test may be skipped in the VM" in done.stdout) == (code == 1)
