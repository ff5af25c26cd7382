"""A virtual machine that boots, runs one command with the files of the host, and ends.

Its root is that of the host, shared read-only, under an overlay in memory: programs, the checkout and its virtual
environment have the same paths as on the host, and written files are lost with the machine. It has no network. It has
the id of a rig (tests/rig/cleanup.py), so that it is removed when its owner ends.
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
"""The filesystems, which have project quotas and are mounted at `mount_point(name)`."""

FILESYSTEM_VARIABLE = "GPUDOCK_VM_FILESYSTEM"
"""An environment variable: in the VM, the filesystem with the files of the rig; unset outside."""

USERLAND = Path(__file__).parent / "guest/userland"
MKFS = {
    XFS: ["mkfs.xfs", "-q"],
    # Without reserved blocks, so that root can fill it completely, as XFS.
    EXT4: ["mkfs.ext4", "-q", "-m", "0", "-O", "quota,project", "-E", "quotatype=prjquota"],
}
MOUNT_OPTIONS = {XFS: "pquota", EXT4: "prjquota"}
"""The mount options that enable project quotas."""

_DISK_BYTES = 8 << 30
_POLL_S = 0.02
_CONSOLE_TAIL = 3000
# An emulated machine is 10 to 20 times slower.
_PATIENCE = "10"


def mount_point(filesystem: str) -> Path:
    """The mount point of a filesystem in the machine."""
    return Path("/srv") / filesystem


class Machine:
    """A virtual machine of qemu: a context manager that can run one command."""

    def __init__(self, *, memory_mib: int = 2048, cpus: int = 2, accelerator: str = "tcg,thread=multi") -> None:
        """Prepare a machine; `start` makes its folder and disks.

        Args:
            memory_mib: the memory; three quarters of it are for files that are written over the host's root.
            cpus: the number of CPUs.
            accelerator: for qemu's -accel. TCG works everywhere; kvm is many times faster where it works.
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
        """Boot, run the command in the root of the checkout, and end; returns 0 or the code of the first failed run.

        Args:
            command: the command line.
            filesystems: the filesystems to run it on, one after the other. GPUDOCK_VM_FILESYSTEM is the name;
                GPUDOCK_RIG_BASE and TMPDIR are below `mount_point(name)`, so that the rig's engine has its data there.
            output: called with the output of the command, stdout and stderr, as it comes.
            timeout_s: seconds for the boot and all runs.

        Raises:
            RigError: time ran out, or the machine ended before the command; the message has the end of the console.
        """
        exchange = self._make_folder("exchange")
        self._write_guest_files(exchange, command, filesystems)
        process = self._boot(exchange)
        finished = _follow(process, output, time.monotonic() + timeout_s)
        code = exchange / "code"
        if finished and code.exists():
            return int(code.read_text())
        what = "ended without an exit code" if finished else f"has not ended after {timeout_s:g} s"
        process.kill9()
        console = (self.folder / "console").read_text(errors="replace")
        raise RigError(f"the VM {what}\n{process.log_text[-_CONSOLE_TAIL:]}\n{console[-_CONSOLE_TAIL:]}")

    def _write_guest_files(self, exchange: Path, command: Sequence[str], filesystems: Sequence[str]) -> None:
        """Write the files that guest/userland reads: settings, and one script for each filesystem."""
        settings = {
            "MODULES": str(Kernel.find().modules),
            "FILESYSTEMS": " ".join(FILESYSTEMS),
            **{f"OPTIONS_{name}": options for name, options in MOUNT_OPTIONS.items()},
            "RUNS": " ".join(filesystems),
        }
        (exchange / "settings").write_text("".join(_assignments(settings)))
        for filesystem in filesystems:
            variables = {
                # The folder of the rig's cache of images and compiled doubles depends on these.
                **{name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME") if name in os.environ},
                "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}",
                "LANG": "C.UTF-8",
                FILESYSTEM_VARIABLE: filesystem,
                "TMPDIR": str(mount_point(filesystem) / "tmp"),
                "GPUDOCK_RIG_BASE": str(mount_point(filesystem) / "rigs"),
                "GPUDOCK_RIG_PATIENCE": _PATIENCE,
                # The calls of gpudockd take longer by the same factor.
                "GPUDOCK_ENGINE_TIMEOUT": "300",
                "GPUDOCK_STORE_TIMEOUT": "50",
                "GPUDOCK_RIG_IMAGES": BUSYBOX,
                # XFS can also limit each container's layer, as an operator may do.
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
            # A machine that reboots, by its script or after a panic, ends.
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
        """Make the folder and the disks; `run` boots the machine."""
        if os.geteuid() != 0:
            raise RigError("the VM needs root, to share all of the host's files")
        cleanup.sweep()
        self._id = cleanup.RigId.create()
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
        """The folder of disks, output and console log on the host."""
        if self._id is None:
            raise RigError("the VM was not started")
        return self._id.folder

    @property
    def guardian_pid(self) -> int:
        """The process id of the guardian, which removes the machine if its owner is killed."""
        if self._guardian is None:
            raise RigError("the VM was not started")
        return self._guardian.pid

    def close(self) -> None:
        """End and remove everything. Raises RigError if something cannot be removed."""
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
    # The host's root may have several devices, whose inode numbers must stay different.
    share = f"local,id={tag},path={folder},security_model=none,multidevs=remap,{access}"
    return ["-fsdev", share, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def _disk(name: str, image: Path) -> list[str]:
    # The disk is not read after the end of the machine, so that its data need not be flushed to the host's disk.
    drive = f"if=none,id={name},file={image},format=raw,cache=unsafe,discard=unmap"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}"]


def _follow(process: Process, output: Callable[[str], object], deadline: float) -> bool:
    """Pass on the file `output` in the folder of the log, until the process ends; False after the deadline."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with (process.log.parent / "output").open("rb") as file:
        while True:
            # `running` is read first, so that the output before the end is read completely.
            running = process.running
            if text := decoder.decode(file.read(), final=not running):
                output(text)
            if not running:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
