"""A machine that boots, runs one command over the host's files, and is gone.

Its root is the host's, shared read-only, under a layer in memory: programs, the checkout and its virtual environment
are at the paths that they have outside, and whatever is written there is lost with the machine. It has no network. It
belongs to a rig's id (tests/rig/cleanup.py), so that nothing of it outlives its owner, however that ends.
"""

import codecs
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig import BUSYBOX, Process, RigError, cleanup
from tests.rig.engine import SYSTEM_PATH
from tests.rig.process import ProcessGroup
from tests.rig.rig import REPOSITORY

from .kernel import Kernel

XFS = "xfs"
EXT4 = "ext4"
FILESYSTEMS = (XFS, EXT4)
"""Both have project quotas and are mounted at `mount_point(name)`."""

FILESYSTEM_VARIABLE = "GPUDOCK_VM_FILESYSTEM"
"""Inside, names the filesystem that the rig's files are on; unset outside."""

USERLAND = Path(__file__).parent / "guest/userland"
MKFS = {
    XFS: ["mkfs.xfs", "-q"],
    # Root may fill it to the last block, as it may XFS.
    EXT4: ["mkfs.ext4", "-q", "-m", "0", "-O", "quota,project", "-E", "quotatype=prjquota"],
}
MOUNT_OPTIONS = {XFS: "pquota", EXT4: "prjquota"}
"""What gives each its project quotas."""

_DISK_BYTES = 8 << 30
_POLL_S = 0.02
_CONSOLE_TAIL = 3000
# Emulated, all is 10 to 20 times slower.
_PATIENCE = "10"


def mount_point(filesystem: str) -> Path:
    """Where it is inside the machine."""
    return Path("/srv") / filesystem


class Machine:
    """One virtual machine, of qemu. Use it as a context manager; it can run one command."""

    def __init__(self, *, memory_mib: int = 2048, cpus: int = 2, accelerator: str = "tcg,thread=multi") -> None:
        """Starts nothing yet.

        Args:
            memory_mib: its memory, three quarters of which can hold what is written over the host's root.
            cpus: how many it has.
            accelerator: what qemu's -accel takes. TCG works everywhere; kvm is many times as fast where it works.
        """
        self._hardware = ["-m", str(memory_mib), "-smp", str(cpus), "-accel", accelerator, "-cpu", "max"]
        self._id: cleanup.RigId | None = None
        self._processes: ProcessGroup | None = None
        self._guardian: subprocess.Popen[bytes] | None = None

    def run(
        self,
        command: Sequence[str],
        filesystems: Sequence[str] = FILESYSTEMS,
        *,
        output: Callable[[str], object] = sys.stdout.write,
        timeout_s: float = 900.0,
    ) -> int:
        """Boots, runs the command in the checkout's root, and ends; returns 0 or the code of the first run that failed.

        Args:
            command: its words.
            filesystems: on which to run it, one after the other: GPUDOCK_VM_FILESYSTEM names it, its files' folder is
                `mount_point(name)`, and GPUDOCK_RIG_BASE and TMPDIR lie there, so that a rig's engine has its data
                there.
            output: told what the command prints, stdout and stderr as they come.
            timeout_s: until the whole of it has to be over.

        Raises:
            RigError: time ran out, or the machine ended before the command did; the kernel's last words are in it.
        """
        exchange = self._make_folder("exchange")
        self._write_orders(exchange, command, filesystems)
        process = self._boot(exchange)
        finished = _follow(process, output, time.monotonic() + timeout_s)
        code = exchange / "code"
        if finished and code.exists():
            return int(code.read_text())
        what = "ended without an exit code" if finished else f"has not ended after {timeout_s:g} s"
        process.kill9()
        console = (self.folder / "console").read_text(errors="replace")
        raise RigError(f"the VM {what}\n{process.log_text[-_CONSOLE_TAIL:]}\n{console[-_CONSOLE_TAIL:]}")

    def _write_orders(self, exchange: Path, command: Sequence[str], filesystems: Sequence[str]) -> None:
        """What guest/userland reads: its settings, and one script for each filesystem."""
        settings = {
            "MODULES": str(Kernel.find().modules),
            "FILESYSTEMS": " ".join(FILESYSTEMS),
            **{f"OPTIONS_{name}": options for name, options in MOUNT_OPTIONS.items()},
            "RUNS": " ".join(filesystems),
        }
        (exchange / "settings").write_text("".join(_assignments(settings)))
        for filesystem in filesystems:
            variables = {
                # The rig's cache of images and compiled doubles is found by these, and read from there.
                **{name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME") if name in os.environ},
                "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}",
                "LANG": "C.UTF-8",
                FILESYSTEM_VARIABLE: filesystem,
                "TMPDIR": str(mount_point(filesystem) / "tmp"),
                "GPUDOCK_RIG_BASE": str(mount_point(filesystem) / "rigs"),
                "GPUDOCK_RIG_PATIENCE": _PATIENCE,
                # And what gpudockd calls may take as much longer than its settings have it.
                "GPUDOCK_ENGINE_TIMEOUT": "300",
                "GPUDOCK_STORE_TIMEOUT": "50",
                "GPUDOCK_RIG_IMAGES": BUSYBOX,
                # On one that can, a quota on every container's layer too, as an operator may have set it.
                "GPUDOCK_RIG_ENGINE_OPTIONS": "--storage-opt overlay2.size=512M" if filesystem == XFS else "",
            }
            lines = [f"export {line}" for line in _assignments(variables)]
            lines += [f"cd {shlex.quote(str(REPOSITORY))}\n", f"exec {shlex.join(command)}\n"]
            (exchange / f"{filesystem}.sh").write_text("".join(lines))

    def _boot(self, exchange: Path) -> Process:
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None or self._processes is None:
            raise RigError("there is no qemu-system-x86_64: run scripts/install-prerequisites --vm")
        kernel, initramfs = Kernel.find(), self.folder / "initramfs"
        kernel.write_initramfs(initramfs)
        cmdline = f"console=ttyS0 quiet panic=-1 mitigations=off gpudock.userland={USERLAND}"
        words = [
            *[qemu, *self._hardware, "-machine", "q35", "-nodefaults", "-no-user-config", "-display", "none"],
            *["-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", cmdline],
            # A machine that starts again, after its order or after a panic, ends.
            *["-no-reboot", "-serial", f"file:{self.folder / 'console'}", "-device", "virtio-rng-pci"],
            *_share("host", Path("/"), "readonly=on"),
            *_share("exchange", exchange, "readonly=off"),
            *["-device", "virtio-serial-pci", "-chardev", f"file,id=output,path={self.folder / 'output'}"],
            *["-device", "virtserialport,chardev=output,name=output"],
        ]
        for filesystem in FILESYSTEMS:
            words += _disk(filesystem, self.folder / f"{filesystem}.disk")
        (self.folder / "output").touch()
        return self._processes.start(words, log=self.folder / "qemu.log")

    def start(self) -> Self:
        """Makes its folder and its disks; `run` boots it."""
        if os.geteuid() != 0:
            raise RigError("the VM needs root, to share all of the host's files")
        cleanup.sweep()
        self._id = cleanup.RigId.mint()
        try:
            guard = [sys.executable, "-I", "-S", cleanup.__file__, str(self._id)]
            self._guardian = subprocess.Popen(guard, cwd="/", stdin=subprocess.DEVNULL, start_new_session=True)
            self._processes = ProcessGroup(cleanup.tracking_hierarchy() / self._id.group / "processes")
            for filesystem, make in MKFS.items():
                disk = self.folder / f"{filesystem}.disk"
                with disk.open("wb") as image:
                    image.truncate(_DISK_BYTES)
                subprocess.run([*make, str(disk)], check=True)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def folder(self) -> Path:
        """Holds its disks, its output and its console's log, on the host."""
        if self._id is None:
            raise RigError("the VM was not started")
        return self._id.folder

    @property
    def guardian_pid(self) -> int:
        """Pid of the process that cleans up if this one cannot."""
        if self._guardian is None:
            raise RigError("the VM was not started")
        return self._guardian.pid

    def close(self) -> None:
        """Ends and removes everything; raises RigError if something would not go."""
        if self._id is None:
            return
        left = cleanup.destroy(self._id)
        if self._processes is not None:
            self._processes.reap()
        if self._guardian is not None:
            self._guardian.kill()
            self._guardian.wait()
        if left:
            raise RigError("the VM left behind: " + "; ".join(left))
        self._id = None

    def _make_folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir()
        return path

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _assignments(values: Mapping[str, str]) -> list[str]:
    return [f"{name}={shlex.quote(text)}\n" for name, text in values.items()]


def _share(tag: str, folder: Path, access: str) -> list[str]:
    # The host's root may span several devices, whose inode numbers must not meet.
    share = f"local,id={tag},path={folder},security_model=none,multidevs=remap,{access}"
    return ["-fsdev", share, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def _disk(name: str, image: Path) -> list[str]:
    # Nobody reads it when the machine is gone: nothing has to reach the host's disk in time.
    drive = f"if=none,id={name},file={image},format=raw,cache=unsafe,discard=unmap"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}"]


def _follow(process: Process, output: Callable[[str], object], deadline: float) -> bool:
    """Hands on what comes in the file `output` beside the process's log, until its end; False if time runs out."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with (process.log.parent / "output").open("rb") as file:
        while True:
            # In this order: what was written before the end is read after it.
            running = process.running
            if text := decoder.decode(file.read(), final=not running):
                output(text)
            if not running:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
