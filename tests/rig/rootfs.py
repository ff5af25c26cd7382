"""Root file systems for test images, made from binaries of the host, since the tests have no registry to pull from."""

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import RigError

USER_ID = 1000
"""The uid and gid of the user `user` in every test image."""

_ETC = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n",
    "etc/group": "root:x:0:\nuser:x:1000:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_COREUTILS = (
    "basename cat chgrp chmod chown cp cut date dd df dirname du echo env false head id install ln ls md5sum mkdir "
    "mkfifo mknod mktemp mv nproc od pwd readlink realpath rm rmdir seq sha256sum sleep sort stat sync tail tee test "
    "timeout touch tr true truncate tty uname uniq wc whoami yes"
)
_PROGRAMS = f"bash {_COREUTILS} find grep sed tar gzip getfattr setfattr attr diff cmp pgrep ps"
_NOT_OF_PYTHON = re.compile(
    r"/(test|tests|idlelib|ensurepip|lib2to3|distutils|config-[^/]*|tkinter|turtledemo|pydoc_data|__pycache__|"
    r"dist-packages|site-packages|unittest|xml|curses|dbm|sqlite3|wsgiref|xmlrpc|venv|msilib)(/|$)"
)
_DYNLOAD = re.compile(r"/lib-dynload/(?!_(ssl|hashlib|sqlite3|curses|dbm|tkinter|gdbm|test))")


class RootFs:
    """Writes a tar. The time of every file is in 2024, so that equal trees make equal tars."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by `close`
        self._names: set[str] = set()

    def close(self) -> None:
        """Write the end of the archive."""
        self._tar.close()

    def folder(self, name: str, mode: int = 0o755, owner: int = 0) -> None:
        """Add a folder and its parents."""
        if name in self._names or not name:
            return
        self.folder(os.path.dirname(name))  # noqa: PTH120 - a name in the archive, not a path here
        self._add(name, tarfile.DIRTYPE, mode=mode, owner=owner)

    def file(self, name: str, content: bytes, mode: int = 0o644, owner: int = 0) -> None:
        """Add a file and its parent folders."""
        if name in self._names:
            return
        self.folder(os.path.dirname(name))  # noqa: PTH120 - a name in the archive, not a path here
        self._add(name, tarfile.REGTYPE, mode=mode, owner=owner, content=content)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link and its parent folders."""
        if name not in self._names:
            self.folder(os.path.dirname(name))  # noqa: PTH120 - a name in the archive, not a path here
            self._add(name, tarfile.SYMTYPE, link=target)

    def host_file(self, path: Path, name: str | None = None) -> None:
        """Copy a file of the host, following links, to the same path or to `name`."""
        mode = 0o755 if os.access(path, os.X_OK) else 0o644
        self.file(name or str(path).lstrip("/"), path.read_bytes(), mode)

    def basics(self) -> None:
        """Add what every root has: empty folders, /tmp, the home of `user`, files of /etc."""
        for name in ("dev", "proc", "sys", "run", "root", "mnt", "opt", "srv", "usr/local/bin"):
            self.folder(name)
        for name in ("tmp", "var/tmp"):
            self.folder(name, 0o1777)
        self.folder("home/user", 0o755, USER_ID)
        for name, text in _ETC.items():
            self.file(name, text.encode())

    def _add(
        self, name: str, kind: bytes, *, mode: int = 0o777, owner: int = 0, content: bytes = b"", link: str = ""
    ) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.uid, entry.gid, entry.linkname = kind, mode, owner, owner, link
        entry.size, entry.mtime = len(content), 1704067200
        self._tar.addfile(entry, io.BytesIO(content))
        self._names.add(name)


def write_busybox(path: Path, extra: Mapping[str, bytes]) -> None:
    """Write the tar of a root with busybox-static and a link for each applet, about 2 MB."""
    busybox = _busybox()
    applets = subprocess.run([busybox, "--list-full"], check=True, capture_output=True, text=True).stdout.split()
    root = RootFs(path)
    root.basics()
    root.host_file(busybox, "bin/busybox")
    for applet in applets:
        root.link(applet, "/bin/busybox")
    for name, content in extra.items():
        root.file(name, content)
    root.close()


def write_glibc(path: Path) -> None:
    """Write the tar of a root with glibc, bash, coreutils, attr, tar, find and, if the host has it, Python's core."""
    root = RootFs(path)
    for name in ("bin", "sbin", "lib", "lib64"):
        root.folder(f"usr/{name}")
        root.link(name, f"usr/{name}")
    root.basics()
    programs = [Path(found) for word in _PROGRAMS.split() if (found := shutil.which(word, path="/usr/bin:/bin"))]
    python = Path("/usr/bin/python3").resolve()
    modules = list(_python_modules(python))
    for program in [*programs, *([python] if modules else [])]:
        root.host_file(program, f"usr/bin/{program.name}")
    for module in modules:
        root.host_file(module)
    extensions = [module for module in modules if module.suffix == ".so"]
    for library in _libraries([*programs, *([python] if modules else []), *extensions]):
        root.host_file(library, f"usr{library}" if not str(library).startswith("/usr/") else None)
    root.link("usr/bin/sh", "bash")
    if modules:
        root.link("usr/bin/python3", python.name)
    root.close()


def busybox_key() -> bytes:
    """A key that changes with the files of the busybox root."""
    return _key([_busybox()])


def glibc_key() -> bytes:
    """A key that changes with the files of the glibc root."""
    return _key([Path("/usr/bin") / word for word in [*_PROGRAMS.split(), "python3"]])


def _key(paths: Iterable[Path]) -> bytes:
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()]
    return Path(__file__).read_bytes() + repr(stats).encode()


def _busybox() -> Path:
    found = shutil.which("busybox", path="/usr/bin:/bin:/usr/local/bin")
    if found is None:
        raise RigError("there is no busybox: run scripts/install-prerequisites")
    return Path(found)


def _python_modules(python: Path) -> Iterable[Path]:
    library = Path("/usr/lib") / python.name
    for path in sorted(library.rglob("*")) if library.is_dir() else []:
        name = str(path)
        if path.is_dir() or _NOT_OF_PYTHON.search(name):
            continue
        if path.suffix == ".py" or (path.suffix == ".so" and _DYNLOAD.search(name)):
            yield path


def _libraries(programs: Iterable[Path]) -> list[Path]:
    """The shared libraries of the programs according to ldd, with the dynamic loader."""
    words = ["ldd", *map(str, programs)]
    output = subprocess.run(words, check=False, capture_output=True, text=True).stdout
    return sorted({Path(found) for found in re.findall(r"(?:=> |^\s)(/\S+) \(0x", output, re.MULTILINE)})
