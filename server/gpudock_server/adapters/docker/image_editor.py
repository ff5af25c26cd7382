"""Images of other configs and fewer layers, by the engine's API alone: what is saved is changed, and loaded again.

An image that is loaded may leave out the content of every layer that the engine has already, so an image with another
config costs a few kilobytes, and one whose upper layers were made one costs those. This holds for engines that keep
images in their graph drivers. One that keeps them in containerd wants every layer, and refuses (EngineRejected).
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

from gpudock_server.adapters.docker.connection import Connection, JsonAnswer
from gpudock_server.adapters.docker.failures import engine_errors
from gpudock_server.adapters.docker.image_config import history_of, image_config, merged_history_entry, strip_identity
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
# A save or a load goes through all of an image before it says a word.
_TIMEOUT_FACTOR: Final = 30
# How long a thread waits for the event loop before it looks whether it is to end.
_TURN_SECONDS: Final = 1.0


class ImageEditor:
    """Makes images from an engine's images. `scratch_dir` is the folder of its temporary files; None: the system's."""

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
            detail = f"image {image_id} has {len(layers)} layers, and {base_layers} of them cannot be its base"
            raise LayerCarryFailed(method=_METHOD, detail=detail)
        upper = layers[base_layers:]
        below: list[str] = (await self._inspect_image(onto))["RootFS"]["Layers"] if onto else layers[:base_layers]
        async with AsyncExitStack() as stack:
            # The layers are a tenant's: how much memory their paths take, nobody knows before they are read.
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

    async def _inspect_image(self, image_id: str) -> JsonAnswer:
        answer: JsonAnswer = await self._connection.call("show an image", "GET", f"images/{image_id}/json")
        with engine_errors("show an image"):
            if not answer["RootFS"]["Layers"]:
                raise KeyError("Layers")
        return answer

    async def _history(self, image_id: str, layers: int) -> list[JsonAnswer]:
        """The lines of an image's config about its history, the oldest first."""
        return history_of(await self._inspect_history(image_id), layers)

    async def _inspect_history(self, image_id: str) -> list[JsonAnswer]:
        call = "show an image's history"
        answer: list[JsonAnswer] = await self._connection.call(call, "GET", f"images/{image_id}/history")
        return answer

    # -- out of the engine -------------------------------------------------------------------------------------------

    async def _fetch(
        self, image_id: str, fetched: _FetchedLayers, worker: TreeWorker, kept: Sequence[str] = ()
    ) -> None:
        """Save an image, keeping the layers that are wanted; `worker` indexes them, and those only to be known."""
        call = "save an image"
        await self._require_disk_space(image_id, len(kept))
        timeout = self._connection.timeout * _TIMEOUT_FACTOR
        async with self._connection.stream(call, "GET", f"images/{image_id}/get", timeout=timeout) as response:
            reader = _ResponseReader(response, asyncio.get_running_loop(), timeout)
            index = _Indexer(worker, asyncio.get_running_loop(), reader.interrupt)
            with engine_errors(call), _local_errors(self._scratch):
                await run_to_end(_unpack, reader, fetched, index, reader.interrupt)
        if missing := fetched.missing:
            raise LayerCarryFailed(method=_METHOD, detail=f"the engine's tar of {image_id} lacks layer {missing}")

    async def _require_disk_space(self, image_id: str, kept: int) -> None:
        """What is kept lies here twice, as it came and as one; every other layer once, for a moment."""
        shown = await self._inspect_history(image_id)
        sizes = [size for line in shown if (size := int(line.get("Size") or 0))]
        upper = sum(sizes[:kept])
        needed = 2 * upper + max(sizes, default=0)
        available = shutil.disk_usage(self._scratch).free
        if needed > available:
            raise DiskFull(path=self._scratch, needed_bytes=needed, available_bytes=available)

    # -- and back into it --------------------------------------------------------------------------------------------

    async def _load(self, config: JsonAnswer, reference: str, layer: IO[bytes] | None = None) -> str:
        """Make the image; its id. `layer` is the content of its uppermost one, where the engine lacks that."""
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
        answer: JsonAnswer = await self._connection.call("show an image", "GET", f"images/{reference}/json")
        with engine_errors(call):
            return str(answer["Id"])


@dataclass
class _FetchedLayers:
    """Layers by their digest: those to be `kept` as files, and those that are only to be `known`."""

    kept: frozenset[str]
    known: frozenset[str]
    scratch_dir: str
    stack: AsyncExitStack
    files: dict[str, IO[bytes]] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        """A kept layer that has not come; empty when all have."""
        return next(iter(self.kept - self.files.keys()), "")

    def take(self, content: IO[bytes], index: Callable[[str, IO[bytes]], None]) -> None:
        """Take one file of a saved image; `index` is called with its digest and content if it is a layer."""
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
    """A file without a name, which a daemon that is killed does not leave behind."""
    return tempfile.TemporaryFile(dir=folder)


def _seen_by_others(file: IO[bytes]) -> str:
    """A path by which a child process opens a file without a name; all that was written is in it."""
    file.flush()
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


class _Indexer:
    """Has the child process index layers, for the thread that goes through a saved image."""

    def __init__(self, worker: TreeWorker, loop: asyncio.AbstractEventLoop, interrupt: Interrupt) -> None:
        self._worker = worker
        self._loop = loop
        self._interrupt = interrupt

    def __call__(self, digest: str, file: IO[bytes]) -> None:
        """Wait for it. Raises Interrupted, and what `TreeWorker.call` raises."""
        job = self._worker.call("index_layer", digest=digest, path=_seen_by_others(file))
        running = asyncio.run_coroutine_threadsafe(job, self._loop)
        # In short turns, as for _ResponseReader.
        while not concurrent.futures.wait([running], timeout=_TURN_SECONDS).done:
            try:
                self._interrupt.check()
            except Interrupted:
                running.cancel()
                raise
        running.result()


class _ResponseReader(io.RawIOBase):
    """A response's body as a file, for a thread to read; the loop that it is received by must go on meanwhile."""

    def __init__(self, response: aiohttp.ClientResponse, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        self._response = response
        self._loop = loop
        self._timeout = timeout
        self._rest = b""
        self.interrupt = Interrupt()

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; none at the end. Raises Interrupted, and what the connection fails with."""
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
            # In short turns: whoever waits for this thread has told it so by the interrupt alone.
            self.interrupt.check()
            try:
                async with asyncio.timeout(_TURN_SECONDS):
                    return await self._response.content.readany()
            except TimeoutError:
                if self._loop.time() > deadline:
                    raise


def _unpack(reader: _ResponseReader, fetched: _FetchedLayers, index: _Indexer, interrupt: Interrupt) -> None:
    """Go through a saved image. Raises BrokenTarError, and what reading raises."""
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", reader), mode="r|", bufsize=_CHUNK) as saved:
            while (member := saved.next()) is not None:
                interrupt.check()
                content = saved.extractfile(member) if member.isreg() else None
                if content is not None and _may_be_layer(member.name):
                    fetched.take(content, index)
                saved.members.clear()  # type: ignore[attr-defined]  # see layer_tar.read_layer
    except tarfile.TarError as error:
        raise BrokenTarError(f"the engine's tar is broken: {error}") from error


def _may_be_layer(name: str) -> bool:
    """Engines name them ID/layer.tar, or by their digest as in the layout of the image specification."""
    return name.endswith("/layer.tar") or name.startswith("blobs/")


def _spool(content: IO[bytes], file: IO[bytes]) -> str:
    """Copy a layer, unpacking it if it is compressed; the digest of what was copied."""
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
        raise BrokenTarError(f"a compressed layer is broken: {error}") from error
    return f"sha256:{digest.hexdigest()}"


class _Prefixed(io.RawIOBase):
    """A file of which the beginning has been read already."""

    def __init__(self, begin: bytes, rest: IO[bytes]) -> None:
        self._begin = begin
        self._rest = rest

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        if self._begin:
            piece, self._begin = self._begin[:size], self._begin[size:] if size >= 0 else b""
            return piece
        return self._rest.read(size)


def _history_of_lowest(history: Sequence[JsonAnswer], layers: int) -> list[JsonAnswer]:
    """The lines of a history that are about the lowest `layers` layers."""
    kept: list[JsonAnswer] = []
    for line in history:
        layers -= not line.get("empty_layer")
        if layers < 0:
            break
        kept.append(line)
    return kept


async def _archive(config: JsonAnswer, reference: str, layer: IO[bytes] | None) -> AsyncIterator[bytes]:
    """The tar of an image as `docker load` takes it, without the layers that the engine has."""
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
    """Give what fails here, and not in the engine, the name that core knows."""
    try:
        yield
    except (BrokenTarError, JobRefusedError, StalledError, TreeTooLargeError) as error:
        raise LayerCarryFailed(method=_METHOD, detail=str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise DiskFull(path=folder, needed_bytes=free + 1, available_bytes=free) from error
