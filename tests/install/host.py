"""A host to install on: this machine's files in namespaces of the rig, where every change goes to memory."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.rig import Process, Rig, RigError
from tests.rig.engine import SYSTEM_PATH
from tests.rig.rig import REPOSITORY

_DEADLINE_S = 300.0
# An overlay has nothing of what is mounted below; the rig's folder must be the real one, for its sockets.
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
        """Sets it up in `folder`, which is empty; `environment` is the whole one of its scripts."""
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
        """Where this process finds one of its files; symbolic links in it would lead out of it."""
        return self._root / name.lstrip("/")

    def run(self, script: str, **variables: str) -> str:
        """Runs it as root in a checkout, with further variables; returns its output. Raises RigError if it fails."""
        process = self._start(["/bin/sh", "-euc", script], {**self._environment, **variables})
        code = process.wait(_DEADLINE_S)
        if code:
            raise RigError(f"{script}\nended with {code}:\n{process.log_text}")
        return process.log_text

    def start_unit(self, name: str) -> Process:
        """Starts what a unit says, as systemd would after it has made the folders that the unit names."""
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
        """Ends it; its files are gone when nothing runs there any more."""
        self._holder.kill9()
