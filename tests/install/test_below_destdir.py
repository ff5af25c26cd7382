"""`make install` and `make uninstall` with DESTDIR: repeated, upgraded, and with files that an operator changed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.install.wheelhouse import environment
from tests.rig.rig import REPOSITORY

pytestmark = pytest.mark.deep

_DEADLINE_S = 300.0
# Other paths than the defaults, as in a package of a distribution.
_PLACES = {"PREFIX": "/srv/gpudock", "BINDIR": "/usr/bin", "UNITDIR": "/usr/lib/systemd/system"}
_CONFIG = "etc/gpudock/gpudockd.toml"
_UNIT = "usr/lib/systemd/system/gpudockd.service"
_VOLUMES_UNIT = "usr/lib/systemd/system/gpudock-volumes.service"
_STATE = "var/lib/gpudock/etcd/member"


class Checkout:
    """A copy of this checkout that can be edited, and a root folder to install into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.root = folder / "root"
        self.root.mkdir()
        listed = subprocess.run(
            ["scripts/build-wheel", "--list"], cwd=REPOSITORY, check=True, capture_output=True, text=True
        )
        others = [
            str(path.relative_to(REPOSITORY))
            for name in ("deploy", "scripts")
            for path in (REPOSITORY / name).iterdir()
        ]
        for name in (*listed.stdout.splitlines(), *others, "Makefile"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, self.folder / name)

    def make(self, target: str, code: int = 0, **variables: str) -> str:
        """Run make with DESTDIR; return its output."""
        words = [f"{name}={value}" for name, value in {"DESTDIR": str(self.root), **_PLACES}.items()]
        done = subprocess.run(
            ["make", target, *words],
            cwd=self.folder,
            check=False,
            env=environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_DEADLINE_S,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def edit(self, name: str, old: str, new: str) -> None:
        """Edit a file of the checkout."""
        path = self.folder / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def everything(self) -> dict[str, tuple[object, ...]]:
        """Return the type, mode, content and mtime of each path in the root."""
        return {str(path.relative_to(self.root)): _state(path) for path in self.root.rglob("*")}

    def files(self) -> set[str]:
        """Return all paths that are not folders."""
        return {name for name in self.everything() if (path := self.root / name).is_symlink() or not path.is_dir()}


def _state(path: Path) -> tuple[object, ...]:
    stat = path.lstat()
    content = str(path.readlink()) if path.is_symlink() else None
    if content is None and path.is_file():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    # A folder changes, for a moment, when an installation is prepared next to the one in use.
    return stat.st_mode, stat.st_uid, None if path.is_dir() else stat.st_mtime_ns, content


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.timeout(900)
def test_install_upgrade_and_uninstall(checkout: Checkout) -> None:
    root = checkout.root
    checkout.make("install")
    assert {name for name in checkout.files() if not name.startswith("srv/gpudock/")} == {
        "usr/bin/gpudock",
        "usr/bin/gpudockd",
        _CONFIG,
        _UNIT,
        _VOLUMES_UNIT,
    }
    assert str((root / "usr/bin/gpudockd").readlink()) == "/srv/gpudock/bin/gpudockd"
    assert "ExecStart=/srv/gpudock/bin/gpudockd" in (root / _UNIT).read_text().splitlines()
    assert _version(root) == "gpudockd 0.1.0"
    # No file, also no script or compiled file, contains the path of DESTDIR.
    named = subprocess.run(["grep", "-rlF", str(root), str(root)], check=False, capture_output=True, text=True)
    assert named.stdout == ""
    systemd = Path("/usr/lib/systemd/system")
    shutil.copytree(systemd, root / systemd.relative_to("/"), symlinks=True, dirs_exist_ok=True)
    verify = ["systemd-analyze", "verify", f"--root={root}", "--man=no", "--recursive-errors=no"]
    units = [Path(_UNIT).name, Path(_VOLUMES_UNIT).name]
    verified = subprocess.run([*verify, *units], check=False, capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")

    before = checkout.everything()
    output = checkout.make("install")
    assert output == "unchanged  /srv/gpudock\n"
    assert checkout.everything() == before

    # A failed installation changes nothing.
    checkout.edit("pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"')
    checkout.make("install", code=2, PIP_FIND_LINKS="/nowhere")
    assert checkout.everything() == before

    # An upgrade with new defaults keeps the changes of the operator.
    with (root / _CONFIG).open("a") as config:
        config.write('log_level = "debug"\n')
    with (root / _UNIT).open("a") as unit:
        unit.write("# changed here\n")
    for name in ("gpudockd.toml", "gpudockd.service", "gpudock-volumes.service"):
        checkout.edit(f"deploy/{name}", "\n", "\n# newer\n")
    (root / _STATE).parent.mkdir(parents=True)
    (root / _STATE).touch()
    kept = {name: _state(root / name) for name in (_CONFIG, _UNIT, _STATE)}
    output = checkout.make("install")
    assert f"kept       /{_CONFIG}, which was changed" in output
    assert f"kept       /{_UNIT}, which was changed" in output
    assert f"installed  /{_VOLUMES_UNIT}" in output
    assert _version(root) == "gpudockd 0.2.0"
    assert {name: _state(root / name) for name in kept} == kept
    assert "# newer" in (root / _VOLUMES_UNIT).read_text()
    assert "# newer" in (root / "srv/gpudock/share/gpudock/gpudockd.toml").read_text()

    output = checkout.make("uninstall")
    for name in (_CONFIG, _UNIT):
        assert f"kept       /{name}, which was changed" in output
    assert "kept       /var/lib/gpudock: " in output
    systemds = {str(path.relative_to("/")) for path in systemd.rglob("*")}
    assert checkout.files() - systemds == set(kept)
    assert {name: _state(root / name) for name in kept} == kept
    assert not (root / "srv/gpudock").exists()
    assert checkout.make("uninstall").splitlines() == [line for line in output.splitlines() if line.startswith("kept")]


def test_files_of_others_are_not_changed(checkout: Checkout) -> None:
    others = checkout.root / "srv/gpudock/others"
    others.parent.mkdir(parents=True)
    others.touch()
    before = checkout.everything()
    for target in ("install", "uninstall"):
        assert "is not an installation of gpudock" in checkout.make(target, code=2)
        assert checkout.everything() == before
    others.unlink()
    link = checkout.root / "usr/bin/gpudock"
    link.parent.mkdir(parents=True)
    link.write_text("another program\n")
    assert "is not a link to /srv/gpudock/bin/gpudock" in checkout.make("install", code=2)
    checkout.make("uninstall")
    assert checkout.files() == {"usr/bin/gpudock"}


def _version(root: Path) -> str:
    """Return the version that the installed program prints."""
    program = [str(root / "srv/gpudock/bin/python"), "-m", "gpudock_server", "--version"]
    return subprocess.run(program, check=True, capture_output=True, text=True, cwd="/").stdout.strip()
