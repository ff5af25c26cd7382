"""Test images, imported into the rig's engine from tars that are built once and cached."""

import contextlib
import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from . import rootfs
from .builds import cached
from .engine import Engine
from .errors import RigError

BUSYBOX = "gpudock/busybox:test"
"""busybox-static: every applet, /bin/sh, /tmp 1777, a user `user` (uid 1000). About 2 MB."""
GLIBC = "gpudock/glibc:test"
"""glibc with bash, coreutils, find, tar, setfattr, getfattr, ps, and the host's Python without its larger modules."""
CUDA_LIKE = "gpudock/cuda-like:test"
"""Busybox with ENV NVIDIA_VISIBLE_DEVICES=all and VOLUME /data, which holds the file `from-image`."""

_PATH = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHELL = 'CMD ["/bin/sh"]'
_CHANGES = {
    BUSYBOX: [_PATH, _SHELL],
    GLIBC: [_PATH, 'CMD ["/bin/bash"]'],
    CUDA_LIKE: [_PATH, _SHELL, "ENV NVIDIA_VISIBLE_DEVICES=all", "VOLUME /data"],
}


class Images:
    """The images of one rig's engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def load(self, name: str) -> str:
        """Import BUSYBOX, GLIBC or CUDA_LIKE; returns the image's id. Raises RigError for another name."""
        if name not in _CHANGES:
            raise RigError(f"{name!r} is not a test image; use derive() for other images")
        return self.import_tar(name, tar_of(name), _CHANGES[name])

    def import_tar(self, name: str, tar: Path, changes: Sequence[str] = ()) -> str:
        """Make an image of one layer from the tar of a root, as `docker import --change` does; returns its id."""
        with tar.open("rb") as body:
            return self._import(name, body, changes)

    def from_files(self, name: str, files: Mapping[str, bytes], changes: Sequence[str] = ()) -> str:
        """Make an image of one layer with only these files (mode 0755); returns its id."""
        return self._import(name, _tar_of(files), changes)

    def derive(
        self, name: str, base: str = BUSYBOX, changes: Sequence[str] = (), files: Mapping[str, bytes] | None = None
    ) -> str:
        """Make an image from another image by a commit; returns its id.

        Args:
            name: repository:tag.
            base: an image of the engine.
            changes: Dockerfile lines, such as `ENV A=b`.
            files: the files of the new layer, with mode 0755.
        """
        repository, _, tag = name.rpartition(":")
        with self._container(base) as container:
            if files:
                self._engine.call("PUT", f"/containers/{container}/archive", query={"path": "/"}, body=_tar_of(files))
            query = {"container": container, "repo": repository, "tag": tag, "changes": changes}
            image: str = self._engine.call("POST", "/commit", query=query, send={})["Id"]
            return image

    @contextlib.contextmanager
    def _container(self, image: str) -> Iterator[str]:
        """A container that is never started, removed after the block."""
        made: str = self._engine.call("POST", "/containers/create", send={"Image": image, "Cmd": ["/never-run"]})["Id"]
        try:
            yield made
        finally:
            self._engine.call("DELETE", f"/containers/{made}")

    def _import(self, name: str, body: BinaryIO, changes: Sequence[str]) -> str:
        repository, _, tag = name.rpartition(":")
        query = {"fromSrc": "-", "repo": repository, "tag": tag, "changes": changes}
        answer = self._engine.call("POST", "/images/create", query=query, body=body)
        if "error" in answer:
            raise RigError(f"cannot import {name}: {answer['error']}")
        image: str = answer["status"]
        return image


def tar_of(name: str) -> Path:
    """The cached tar of the root of a test image; written if it is not in the cache."""
    if name == GLIBC:
        return cached("glibc.tar", rootfs.glibc_key(), rootfs.write_glibc)
    return _busybox_tar({"data/from-image": b"from the image\n"} if name == CUDA_LIKE else {})


def _busybox_tar(extra: Mapping[str, bytes]) -> Path:
    key = rootfs.busybox_key() + repr(sorted(extra.items())).encode()
    return cached("busybox.tar", key, lambda path: rootfs.write_busybox(path, extra))


def _tar_of(files: Mapping[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    buffer.seek(0)
    return buffer
