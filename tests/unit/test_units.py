"""The systemd units of deploy/: systemd accepts every line, and their exposure is limited."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.rig.patience import limit

_UNITS = sorted((Path(__file__).parents[2] / "deploy").glob("*.service"))
# The exposure of `systemd-analyze security`, times ten. 96 is an unconfined service; a daemon that exchanges the layers
# of the engine as root cannot come near 0.
_EXPOSURE = {"gpudockd.service": 65}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root folder with the units, systemd's own, and the programs that the units start."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for unit in _UNITS:
        shutil.copy(unit, units)
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    program = tmp_path / "opt/gpudock/bin/gpudockd"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    return tmp_path


def _analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], check=False, capture_output=True, text=True, timeout=limit(60))


def _verify(root: Path) -> subprocess.CompletedProcess[str]:
    names = [unit.name for unit in _UNITS]
    return _analyze("verify", f"--root={root}", "--man=no", "--recursive-errors=no", *names)


def test_systemd_accepts_every_line(root: Path) -> None:
    done = _verify(root)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", ["ProtectSystme=full", "ExecStart=/opt/gpudock/bin/nothing"])
def test_a_mistake_is_noticed(root: Path, line: str) -> None:
    unit = root / "etc/systemd/system/gpudockd.service"
    key = "ProtectSystem=" if line.startswith("Protect") else "ExecStart="
    lines = [line if old.startswith(key) else old for old in unit.read_text().splitlines()]
    unit.write_text("\n".join(lines))
    assert _verify(root).stderr


@pytest.mark.parametrize(("unit", "exposure"), _EXPOSURE.items())
def test_the_exposure_of_a_unit_is_limited(root: Path, unit: str, exposure: int) -> None:
    done = _analyze("security", "--offline=true", f"--root={root}", f"--threshold={exposure}", unit)
    assert done.returncode == 0, done.stdout
