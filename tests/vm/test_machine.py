"""The VM: output and exit code are returned, written files are lost, and the machine is removed however it ends."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys

import pytest

from tests.rig import RigError, cleanup
from tests.rig.patience import limit
from tests.rig.rig import REPOSITORY

from .kernel import KERNEL_FOLDER
from .machine import EXT4, FILESYSTEM_VARIABLE, XFS, Machine

pytestmark = [
    pytest.mark.skipif(FILESYSTEM_VARIABLE in os.environ, reason="this is the VM"),
    pytest.mark.skipif(not KERNEL_FOLDER.exists(), reason="there is no kernel: `make test-vm` fetches it"),
    pytest.mark.skipif(
        shutil.which("qemu-system-x86_64") is None, reason="there is no qemu: `make test-vm` installs it"
    ),
]
BOOT_S = 240.0


def test_output_and_exit_code_are_returned_and_written_files_are_lost() -> None:
    script = f"""
echo "on ${FILESYSTEM_VARIABLE}"; echo to stderr >&2
stat -f -c %T "/srv/${FILESYSTEM_VARIABLE}"
grep -c ' /srv/.*prjquota' /proc/mounts
pwd > written-in-the-vm && cat written-in-the-vm
[ "${FILESYSTEM_VARIABLE}" = xfs ] || exit 137
"""
    printed: list[str] = []
    with Machine() as machine:
        code = machine.run(["sh", "-c", script], (EXT4, XFS), output=printed.append, timeout_s=BOOT_S)
        folder = machine.folder
    lines = [line for line in "".join(printed).splitlines() if not line.startswith("===")]
    assert lines == [
        *["on ext4", "to stderr", "ext2/ext3", "2", str(REPOSITORY)],
        *["on xfs", "to stderr", "xfs", "2", str(REPOSITORY)],
    ]
    assert code == 137
    assert not (REPOSITORY / "written-in-the-vm").exists()
    assert not folder.exists()


def test_a_machine_that_panics_is_an_error() -> None:
    with Machine() as machine, pytest.raises(RigError, match="ended without an exit code"):
        machine.run(["sh", "-c", "echo c > /proc/sysrq-trigger"], (XFS,), output=len, timeout_s=BOOT_S)


def test_a_machine_that_takes_too_long_is_ended() -> None:
    with Machine() as machine:
        rig = cleanup.RigId.parse(machine.folder.name)
        with pytest.raises(RigError, match="has not ended after 1 s"):
            machine.run(["true"], timeout_s=1.0)
    assert rig is not None
    assert cleanup.leftovers(rig) == []


def test_a_machine_is_removed_after_its_owner_was_killed() -> None:
    script = """
import threading, time
from tests.rig import cleanup
from tests.vm import Machine
machine = Machine().start()
rig = cleanup.RigId.parse(machine.folder.name)
threading.Thread(target=machine.run, args=(["true"],), daemon=True).start()
while not cleanup.processes_of(rig):
    time.sleep(0.01)
print(rig, machine.guardian_pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        name, guardian = owner.stdout.readline().split()
        descriptor = os.pidfd_open(int(guardian))
        owner.send_signal(signal.SIGKILL)
    rig = cleanup.RigId.parse(name)
    assert rig is not None
    ended, _, _ = select.select([descriptor], [], [], limit(30))
    os.close(descriptor)
    assert ended
    assert cleanup.leftovers(rig) == []
