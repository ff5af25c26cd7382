"""The kernel of the VM, which scripts/fetch-vm-kernel has fetched, and its initial RAM disk."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.rig import RigError
from tests.rig.rig import REPOSITORY

KERNEL_FOLDER = REPOSITORY / ".vm/kernel"
INIT = Path(__file__).parent / "guest/init"
# The modules that mount the host's root; all others are loaded from there.
_FIRST_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
# Distributions compress modules in different formats, which busybox's insmod does not read.
_UNPACK = {".ko": ["cat"], ".xz": ["xz", "-dc"], ".zst": ["zstd", "-qdc"], ".gz": ["gzip", "-dc"]}


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package.

    Attributes:
        image: the kernel image.
        modules: the folder for /lib/modules.
        version: the name of the kernel's folder in `modules`.
    """

    image: Path
    modules: Path
    version: str

    @classmethod
    def find(cls, folder: Path = KERNEL_FOLDER) -> "Kernel":
        """Find the kernel. Raises RigError if it was not fetched."""
        for image in sorted(folder.glob("boot/vmlinuz-*")):
            return cls(image, folder / "lib/modules", image.name.removeprefix("vmlinuz-"))
        raise RigError("the test VM has no kernel: run scripts/fetch-vm-kernel, or make test-vm")

    def write_initramfs(self, target: Path) -> None:
        """Write a cpio archive with busybox, the first modules, and the script that is the first process."""
        root = target.with_name(f"{target.name}.root")
        (root / "bin").mkdir(parents=True)
        busybox = shutil.which("busybox")
        if busybox is None or shutil.which("cpio") is None:
            raise RigError("there is no busybox or no cpio: run scripts/install-prerequisites --vm")
        shutil.copy(busybox, root / "bin/busybox")
        shutil.copy(INIT, root / "init")
        (root / "init").chmod(0o755)
        self._put_modules(root / "modules")
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        pack = ["cpio", "--create", "--quiet", "--format", "newc", "--file", str(target)]
        subprocess.run(pack, cwd=root, input=names, text=True, check=True)

    def _put_modules(self, folder: Path) -> None:
        folder.mkdir()
        order = []
        for module in self._in_order():
            name = module.name[: module.name.index(".ko")]
            with (folder / name).open("wb") as unpacked:
                subprocess.run([*_UNPACK[module.suffix], str(module)], stdout=unpacked, check=True)
            order.append(name)
        (folder / "order").write_text("".join(f"{name}\n" for name in order))

    def _in_order(self) -> list[Path]:
        """The first modules and their dependencies, in the order of loading, without built-in modules."""
        command = ["modprobe", "--show-depends", "--all", "--dirname", str(self.modules.parents[1])]
        command += ["--set-version", self.version, *_FIRST_MODULES]
        environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
        paths = [line.split()[1] for line in lines if line.startswith("insmod ")]
        return [Path(path) for path in dict.fromkeys(paths)]
