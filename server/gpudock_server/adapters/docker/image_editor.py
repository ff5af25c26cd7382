"""Creates images with another config or fewer layers through the engine's API alone: save, change, load.

A loaded image may leave out the content of every layer that the engine has already. So an image with another config
costs a few kilobytes, and one with merged upper layers costs the size of these. This works with the engine's graph
drivers. With the containerd image store the engine needs every layer and refuses (EngineRejected).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, cast

import aiohttp

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.adapters.docker.failures import engine_errors
from gpudock_server.adapters.docker.image_config import history_of, image_config, merged_history_entry, strip_identity
from gpudock_server.adapters.docker.translate import Json
from gpudock_server.adapters.host.stalls import StalledError
from gpudock_server.adapters.host.threads import Interrupt, Interrupted, run_to_end
from gpudock_server.adapters.host.trees.jobs import JobRefusedError
from gpudock_server.adapters.host.trees.layer_tar import BLOCK, END, BrokenTarError, header
from gpudock_server.adapters.host.trees.limits import Limits, TreeTooLargeError
from gpudock_server.adapters.host.trees.worker import TreeWorker
from gpudock_server.errors import DiskFull, EngineRejected, LayerCarryFailed

_CHUNK: Final = 1 << 20
_GZIP: Final = b"\x1f\x8b"
_METHOD: Final = "SQUASH"
_LOAD_REFUSED_STATUS: Final = 500
# The engine responds to a save or a load only after it has processed the whole image.
_TIMEOUT_FACTOR: Final = 30
# A thread waits this long for the event loop before it checks its interrupt.
_TURN_SECONDS: Final = 1.0


class ImageEditor:
    """Creates images from an engine's images. `scratch_dir` is for temporary files; None: the system's folder."""

    def __init__(self, connection: Connection, scratch_dir: Path | None) -> None:
        self._connection = connection
        self._scratch = str(scratch_dir) if scratch_dir else tempfile.gettempdir()

    async def replace_config(self, image_id: str, other_id: str, reference: str) -> str:
        """See ports.Engine."""
        shown, other = await self._inspect_image(image_id), await self._inspect_image(other_id)
        layers: list[str] = shown["RootFS"]["Layers"]
        history = await self._history(image_id, len(layers))
        config = image_config(other, other.get("Config") or {}, layers, history)
        return await self._load(config, reference)

    async def strip_identity(self, image_id: str, base_id: str, reference: str) -> str:
        """See ports.Engine."""
        shown, base = await self._inspect_image(image_id), await self._inspect_image(base_id)
        layers: list[str] = shown["RootFS"]["Layers"]
        history = await self._history(image_id, len(layers))
        run = strip_identity(shown.get("Config") or {}, base.get("Config") or {})
        return await self._load(image_config(shown, run, layers, history), reference)

    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str) -> str:
        """See ports.Engine."""
        shown, other = await self._inspect_image(image_id), await self._inspect_image(config_of)
        layers: list[str] = shown["RootFS"]["Layers"]
        if not 0 < base_layers < len(layers):
            allowed = f"base_layers must be 1 to {len(layers) - 1}"
            detail = f"image {image_id} has {len(layers)} layers; {allowed}, got {base_layers}"
            raise LayerCarryFailed(method=_METHOD, detail=detail)
        upper = layers[base_layers:]
        below: list[str] = (await self._inspect_image(onto))["RootFS"]["Layers"] if onto else layers[:base_layers]
        async with AsyncExitStack() as stack:
            # A child process with limited memory: the paths of a tenant's layers can take any amount.
            worker = TreeWorker(Limits().memory_bytes)
            stack.push_async_callback(worker.close)
            fetched = _FetchedLayers(frozenset(upper), frozenset(below), self._scratch, stack)
            await self._fetch(image_id, fetched, worker, upper)
            if onto:
                await self._fetch(onto, _FetchedLayers(frozenset(), frozenset(below), self._scratch, stack), worker)
            merged = stack.enter_context(_temporary_file(self._scratch))
            files = [[digest, _seen_by_others(fetched.files[digest])] for digest in upper]
            with _local_errors(self._scratch):
                made = await worker.call("merge_layers", upper=files, below=below, target=_seen_by_others(merged))
            digest = str(made["digest"])
            source = (onto, len(below)) if onto else (image_id, len(layers))
            history = [*_history_of_lowest(await self._history(*source), len(below)), merged_history_entry(len(upper))]
            config = image_config(other, other.get("Config") or {}, [*below, digest], history)
            return await self._load(config, reference, merged)

    async def _inspect_image(self, image_id: str) -> Json:
        answer: Json = await self._connection.call("inspect an image", "GET", f"images/{image_id}/json")
        with engine_errors("inspect an image"):
            if not answer["RootFS"]["Layers"]:
                raise KeyError("Layers")
        return answer

    async def _history(self, image_id: str, layers: int) -> list[Json]:
        """The history of an image config, the oldest entry first."""
        return history_of(await self._inspect_history(image_id), layers)

    async def _inspect_history(self, image_id: str) -> list[Json]:
        call = "report an image's history"
        answer: list[Json] = await self._connection.call(call, "GET", f"images/{image_id}/history")
        return answer

    # -- saving and loading ------------------------------------------------------------------------------------------

    async def _fetch(
        self, image_id: str, fetched: _FetchedLayers, worker: TreeWorker, kept: Sequence[str] = ()
    ) -> None:
        """Save an image; keeps the layers in `fetched.kept`, has `worker` index them and those in `fetched.known`."""
        call = "save an image"
        await self._require_disk_space(image_id, len(kept))
        timeout = self._connection.timeout * _TIMEOUT_FACTOR
        async with self._connection.stream(call, "GET", f"images/{image_id}/get", timeout=timeout) as response:
            reader = _ResponseReader(response, asyncio.get_running_loop(), timeout)
            index = _Indexer(worker, asyncio.get_running_loop(), reader.interrupt)
            with engine_errors(call), _local_errors(self._scratch):
                await run_to_end(_unpack, reader, fetched, index, reader.interrupt)
        if missing := fetched.missing:
            raise LayerCarryFailed(method=_METHOD, detail=f"saved image {image_id} does not contain layer {missing}")

    async def _require_disk_space(self, image_id: str, kept: int) -> None:
        """Raises DiskFull. Kept layers are on disk twice, as saved and merged; of the others, one at a time."""
        shown = await self._inspect_history(image_id)
        sizes = [size for entry in shown if (size := int(entry.get("Size") or 0))]
        upper = sum(sizes[:kept])
        needed = 2 * upper + max(sizes, default=0)
        available = shutil.disk_usage(self._scratch).free
        if needed > available:
            raise DiskFull(path=self._scratch, needed_bytes=needed, available_bytes=available)

    async def _load(self, config: Json, reference: str, layer: IO[bytes] | None = None) -> str:
        """Load the image; returns its id. `layer` is the content of the uppermost layer, if the engine lacks it."""
        call = "load an image"
        async with self._connection.stream(
            call,
            "POST",
            "images/load",
            params={"quiet": "1"},
            headers={"Content-Type": "application/x-tar"},
            content=_archive(config, reference, layer),
            timeout=self._connection.timeout * _TIMEOUT_FACTOR,
        ) as response:
            async for document in self._connection.documents(call, response):
                if "error" in document or "errorDetail" in document:
                    detail = (document.get("errorDetail") or {}).get("message") or document.get("error")
                    raise EngineRejected(call=call, status=_LOAD_REFUSED_STATUS, detail=str(detail))
        answer: Json = await self._connection.call("inspect an image", "GET", f"images/{reference}/json")
        with engine_errors(call):
            return str(answer["Id"])


@dataclass
class _FetchedLayers:
    """Layers by digest: files of the layers in `kept`; layers in `known` are only indexed."""

    kept: frozenset[str]
    known: frozenset[str]
    scratch_dir: str
    stack: AsyncExitStack
    files: dict[str, IO[bytes]] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        """A layer of `kept` that was not in the saved image; empty if all were."""
        return next(iter(self.kept - self.files.keys()), "")

    def add(self, content: IO[bytes], index: Callable[[str, IO[bytes]], None]) -> None:
        """Add a file of a saved image, if its digest is that of a requested layer; calls `index` for it then."""
        file = _temporary_file(self.scratch_dir)
        try:
            digest = _spool(content, file)
            if digest in self.kept | self.known:
                index(digest, file)
            if digest in self.kept and digest not in self.files:
                self.files[digest] = self.stack.enter_context(file)
                return
        except BaseException:
            file.close()
            raise
        file.close()


def _temporary_file(folder: str) -> IO[bytes]:
    """A file without a name, so that a killed daemon leaves none behind."""
    return tempfile.TemporaryFile(dir=folder)


def _seen_by_others(file: IO[bytes]) -> str:
    """Flush a file without a name; returns a path by which a child process can open it."""
    file.flush()
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


class _Indexer:
    """Has the child process index layers, called by the thread that reads a saved image."""

    def __init__(self, worker: TreeWorker, loop: asyncio.AbstractEventLoop, interrupt: Interrupt) -> None:
        self._worker = worker
        self._loop = loop
        self._interrupt = interrupt

    def __call__(self, digest: str, file: IO[bytes]) -> None:
        """Index the layer in `file` and wait for the result. Raises Interrupted and the errors of `TreeWorker.call`."""
        job = self._worker.call("index_layer", digest=digest, path=_seen_by_others(file))
        running = asyncio.run_coroutine_threadsafe(job, self._loop)
        # Short waits, as in _ResponseReader.
        while not concurrent.futures.wait([running], timeout=_TURN_SECONDS).done:
            try:
                self._interrupt.check()
            except Interrupted:
                running.cancel()
                raise
        running.result()


class _ResponseReader(io.RawIOBase):
    """A response's body as a file, for a thread to read while the event loop receives it."""

    def __init__(self, response: aiohttp.ClientResponse, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        self._response = response
        self._loop = loop
        self._timeout = timeout
        self._rest = b""
        self.interrupt = Interrupt()

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; empty at the end. Raises Interrupted, and errors of the connection."""
        while not self._rest:
            self.interrupt.check()
            self._rest = asyncio.run_coroutine_threadsafe(self._more(), self._loop).result()
            if not self._rest:
                return b""
        size = len(self._rest) if size < 0 else size
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    async def _more(self) -> bytes:
        deadline = self._loop.time() + self._timeout
        while True:
            # Short waits: the thread is stopped only through the interrupt.
            self.interrupt.check()
            try:
                async with asyncio.timeout(_TURN_SECONDS):
                    return await self._response.content.readany()
            except TimeoutError:
                if self._loop.time() > deadline:
                    raise


def _unpack(reader: _ResponseReader, fetched: _FetchedLayers, index: _Indexer, interrupt: Interrupt) -> None:
    """Pass the layers of a saved image to `fetched`. Raises BrokenTarError, and errors of reading."""
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", reader), mode="r|", bufsize=_CHUNK) as saved:
            while (member := saved.next()) is not None:
                interrupt.check()
                content = saved.extractfile(member) if member.isreg() else None
                if content is not None and _may_be_layer(member.name):
                    fetched.add(content, index)
                saved.members.clear()  # type: ignore[attr-defined]  # see layer_tar.read_layer
    except tarfile.TarError as error:
        raise BrokenTarError(f"saved image is corrupt: {error}") from error


def _may_be_layer(name: str) -> bool:
    """Whether a file of a saved image may be a layer: ID/layer.tar, or blobs/ as in the image specification."""
    return name.endswith("/layer.tar") or name.startswith("blobs/")


def _spool(content: IO[bytes], file: IO[bytes]) -> str:
    """Copy a layer, decompressing it if needed; returns the digest of the copy."""
    begin = content.read(len(_GZIP))
    source: IO[bytes] = cast("IO[bytes]", _Prefixed(begin, content))
    if begin == _GZIP:
        source = cast("IO[bytes]", gzip.GzipFile(fileobj=source))
    digest = hashlib.sha256()
    try:
        while piece := source.read(_CHUNK):
            digest.update(piece)
            file.write(piece)
    except (EOFError, gzip.BadGzipFile) as error:
        raise BrokenTarError(f"corrupt gzip layer: {error}") from error
    return f"sha256:{digest.hexdigest()}"


class _Prefixed(io.RawIOBase):
    """A file whose beginning has been read already."""

    def __init__(self, begin: bytes, rest: IO[bytes]) -> None:
        self._begin = begin
        self._rest = rest

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        if self._begin:
            piece, self._begin = self._begin[:size], self._begin[size:] if size >= 0 else b""
            return piece
        return self._rest.read(size)


def _history_of_lowest(history: Sequence[Json], layers: int) -> list[Json]:
    """The entries of a history about the lowest `layers` layers."""
    kept: list[Json] = []
    for entry in history:
        layers -= not entry.get("empty_layer")
        if layers < 0:
            break
        kept.append(entry)
    return kept


async def _archive(config: Json, reference: str, layer: IO[bytes] | None) -> AsyncIterator[bytes]:
    """The tar of an image for `docker load`, without the layers that the engine has."""
    encoded = json.dumps(config).encode()
    name = f"{hashlib.sha256(encoded).hexdigest()}.json"
    layers = [f"{digest.partition(':')[2]}/layer.tar" for digest in config["rootfs"]["diff_ids"]]
    manifest = json.dumps([{"Config": name, "RepoTags": [reference], "Layers": layers}]).encode()
    for path, content in ((name, encoded), ("manifest.json", manifest)):
        yield _file_header(path, len(content)) + content + _padding(len(content))
    if layer is not None:
        size = layer.seek(0, os.SEEK_END)
        layer.seek(0)
        yield _file_header(layers[-1], size)
        while piece := await asyncio.to_thread(layer.read, _CHUNK):
            yield piece
        yield _padding(size)
    yield END


def _file_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return header(member)


def _padding(size: int) -> bytes:
    return b"\0" * (-size % BLOCK)


@contextmanager
def _local_errors(folder: str) -> Iterator[None]:
    """Translate failures on this host to domain errors: LayerCarryFailed, DiskFull."""
    try:
        yield
    except (BrokenTarError, JobRefusedError, StalledError, TreeTooLargeError) as error:
        raise LayerCarryFailed(method=_METHOD, detail=str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise DiskFull(path=folder, needed_bytes=free + 1, available_bytes=free) from error
