"""A host to install on: the files of this machine in namespaces of the rig, with all changes in memory."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.rig import Process, Rig, RigError
from tests.rig.engine import SYSTEM_PATH
from tests.rig.rig import REPOSITORY

_DEADLINE_S = 300.0
# An overlay does not include mounts below it; the folder of the rig must be the real one, for its sockets.
_SET_UP = """
space=$1 rig=$2 engine=$3
mount -t tmpfs -o mode=755 host "$space"
mkdir "$space/upper" "$space/work" "$space/root"
mount -t overlay -o "lowerdir=/,upperdir=$space/upper,workdir=$space/work" overlay "$space/root"
for folder in /proc /sys /dev "$rig"; do
    mount --rbind "$folder" "$space/root$folder"
done
mount -t tmpfs -o mode=755 host "$space/root/run"
cd "$space/root"
rm -rf opt/gpudock etc/gpudock etc/systemd/system/gpudock* var/lib/gpudock usr/local/bin/gpudock* \
    usr/local/lib/systemd/system/gpudock*
# The engine where Docker has it; and signs that systemd runs, which records the commands that it gets.
ln -s "$engine" run/docker.sock
mkdir -p run/systemd/system
for program in systemctl apt; do
    rm -f "usr/bin/$program"
    printf '#!/bin/sh\\necho "%s $*" >>/run/calls\\n' "$program" >"usr/bin/$program"
    chmod 755 "usr/bin/$program"
done
: >run/ready
exec chroot . sleep infinity
"""


class Host:
    """Runs scripts on it. Processes that they leave behind are ended with the rig at the latest."""

    def __init__(self, rig: Rig, folder: Path, environment: Mapping[str, str]) -> None:
        """Set up the host in an empty folder. `environment` is the whole environment of its scripts."""
        self._rig = rig
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._environment = environment
        self._numbers = itertools.count(1)
        space = folder / "space"
        space.mkdir()
        self._holder = rig.processes.start(
            ["/bin/sh", "-euc", _SET_UP, "sh", space, rig.folder, rig.engine.socket],
            log=self._logs / "set-up",
            inside=[*rig.namespaces.enter(), "unshare", "--mount", "--propagation", "private"],
        )
        self._root = Path(f"/proc/{self._holder.pid}/root")
        self._holder.wait_until((self._root / "run/ready").exists)

    def path(self, name: str) -> Path:
        """Return the path of a file of the host for this process; symbolic links in it would leave the host."""
        return self._root / name.lstrip("/")

    def run(self, script: str, **variables: str) -> str:
        """Run a script as root in the checkout; return its output. Raises RigError if it fails."""
        process = self._start(["/bin/sh", "-euc", script], {**self._environment, **variables})
        code = process.wait(_DEADLINE_S)
        if code:
            raise RigError(f"{script}\nended with {code}:\n{process.log_text}")
        return process.log_text

    def start_unit(self, name: str) -> Process:
        """Start the program of a unit, after creating the folders of the unit, as systemd does."""
        lines = self.path(f"/usr/local/lib/systemd/system/{name}.service").read_text(encoding="utf-8").splitlines()
        settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        for setting, base in (("RuntimeDirectory", "/run"), ("StateDirectory", "/var/lib")):
            if setting in settings:
                self.run(f"mkdir -p -m {settings[setting + 'Mode']} {base}/{settings[setting]}")
        program = shlex.split(settings["ExecStart"].removeprefix("-"))
        return self._start(program, {"PATH": SYSTEM_PATH, **self._rig.environment})

    def _start(self, argv: Sequence[str], environment: Mapping[str, str]) -> Process:
        return self._rig.processes.start(
            argv,
            log=self._logs / str(next(self._numbers)),
            cwd=REPOSITORY,
            environment=environment,
            inside=["nsenter", "--target", str(self._holder.pid), "--net", "--mount", "--root", "--wd", "--"],
        )

    def close(self) -> None:
        """End the host. Its files are gone when its last process has ended."""
        self._holder.kill9()
