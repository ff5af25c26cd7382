"""ports.VolumeCopier by rsync: the bulk while the source is in use, then the difference, then a reading of both."""

from __future__ import annotations

import asyncio
import re
from asyncio import StreamReader
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpudock_server.adapters.layers.copying import StillCopyingError, sole_writer, tree_bytes
from gpudock_server.adapters.layers.privilege import why_no_copy
from gpudock_server.adapters.layers.threads import run_to_end
from gpudock_server.adapters.trees.jobs import JobRefusedError
from gpudock_server.adapters.trees.limits import Limits, TreeTooLargeError
from gpudock_server.adapters.trees.stalls import DEFAULT_STALL_SECONDS, StalledError, unless_stalled
from gpudock_server.adapters.trees.syncing import write_out
from gpudock_server.adapters.trees.worker import TreeWorker, ended
from gpudock_server.adapters.volumes.failures import volume_errors
from gpudock_server.adapters.volumes.programs import ProgramFailed, environment, missing, mortal
from gpudock_server.adapters.volumes.view import Reachable, View, mounted
from gpudock_server.errors import VolumeFailed
from gpudock_server.model.volume import TreeSummary, VolumeBacking
from gpudock_server.ports import Progress, VolumeCopier

_MEASURE_SECONDS: Final = 300.0
_COMPLAINT_BYTES: Final = 16384
_SHOWN_CHARACTERS: Final = 600
# rsync(1): some files vanished before they could be read; whoever uses the source may delete.
_VANISHED: Final = 24
_BYTES_SO_FAR: Final = re.compile(rb"\s*(\d+)\s")
# a: all metadata, H: hard links, A: ACLs, X: extended attributes, S: holes stay holes. Times are compared to the
# nanosecond: what is written twice within a second would otherwise look the same.
_OPTIONS: Final = ("-aHAXS", "--numeric-ids", "--delete", "--modify-window=-1", "--one-file-system")


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two stores in one namespace."""

    view: View
    source: Path
    target: Path

    @property
    def old(self) -> str:
        """The source's root, from here."""
        return self.view.path(self.source)

    @property
    def new(self) -> str:
        """The target's root, from here."""
        return self.view.path(self.target)


class RsyncCopier(VolumeCopier):
    """Implements ports.VolumeCopier between stores of any of `backends`, whether they are mounted or not."""

    def __init__(self, backends: Iterable[Reachable], stall_seconds: float = DEFAULT_STALL_SECONDS) -> None:
        """A copy or a comparison that makes no progress for `stall_seconds` is ended and fails."""
        self._backends = {backend.kind: backend for backend in backends}
        self._stall_seconds = stall_seconds

    async def copy(
        self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, thorough: bool = False
    ) -> None:
        """See the protocol. What is in the target and not in the source is deleted there."""
        async with self._both("copy", source, target) as pair:
            with volume_errors("copy", source.name, Path(pair.new), source.size_bytes):
                if reason := missing("rsync") or why_no_copy():
                    raise ProgramFailed(reason)
                try:
                    total = await tree_bytes(pair.old, apparent=True, timeout_seconds=_MEASURE_SECONDS)
                    async with sole_writer(pair.new) as lock:
                        await _rsync(pair, lock, total, progress, self._stall_seconds, thorough=thorough)
                except (StillCopyingError, StalledError) as error:
                    raise ProgramFailed(str(error)) from error
                except TimeoutError as error:
                    raise ProgramFailed("its files could not be counted in time") from error

    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        """See the protocol."""
        async with self._both("verify the copy of", source, target) as pair:
            with volume_errors("verify the copy of", source.name, Path(pair.new)):
                worker = TreeWorker(Limits().memory_bytes, self._stall_seconds)
                try:
                    # One after the other: the two share a disk.
                    before = TreeSummary(**await worker.call("digest", root=pair.old))
                    after = TreeSummary(**await worker.call("digest", root=pair.new))
                    if before == after:
                        return before
                    found = (await worker.call("differences", old=pair.old, new=pair.new))["found"]
                except (JobRefusedError, StalledError, TreeTooLargeError) as error:
                    raise ProgramFailed(str(error)) from error
                finally:
                    await worker.close()
        detail = f"the copy is not equal: {'; '.join(found) or 'the content of a file differs'}"
        raise VolumeFailed(volume=source.name, call="verify the copy of", detail=detail)

    @asynccontextmanager
    async def _both(self, call: str, source: VolumeBacking, target: VolumeBacking) -> AsyncIterator[_Pair]:
        if source.uid == target.uid:
            raise VolumeFailed(volume=source.name, call=call, detail="source and target are the same store")
        old = await self._backends[source.kind].reach(source)
        new = await self._backends[target.kind].reach(target)
        async with AsyncExitStack() as stack:
            with volume_errors(call, source.name, new.path.parent):
                mounts = [one.mount for one in (old, new) if one.mount is not None]
                view = await stack.enter_async_context(mounted(mounts))
            yield _Pair(view=view, source=old.path, target=new.path)


async def _rsync(
    pair: _Pair, lock: int, total: int, progress: Progress, stall_seconds: float, *, thorough: bool
) -> None:
    checking = ["--checksum"] if thorough else []
    told = ["--info=progress2", "--no-human-readable"]
    command = ["rsync", *_OPTIONS, *checking, *told, "--", f"{pair.source}/", f"{pair.target}/"]
    process = await asyncio.create_subprocess_exec(
        *mortal(pair.view.entered(*command)),
        stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True, pass_fds=(lock,), env=environment(),
    )  # fmt: skip
    try:
        progress(0, total)
        complaint = await unless_stalled(_heard(process, total, progress), process.pid, "rsync", stall_seconds)
        code = await process.wait()
    finally:
        await ended(process)
    if code not in (0, _VANISHED):
        raise ProgramFailed(f"rsync ended with {code}: {_without_middle(complaint)}")
    await run_to_end(write_out, lock)
    progress(total, total)


def _without_middle(text: str) -> str:
    """The text; of a long one, which is mostly a long path, the beginning and the end."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[: _SHOWN_CHARACTERS // 3]}...{text[-_SHOWN_CHARACTERS * 2 // 3 :]}"


async def _heard(process: Process, total: int, progress: Progress) -> str:
    """Pass on progress until the process closes its outputs; what it said on stderr."""
    complaint, _ = await asyncio.gather(_complaint(process), _reported(process, total, progress))
    return complaint


async def _reported(process: Process, total: int, progress: Progress) -> None:
    """Pass on what rsync prints about once a second: the bytes so far, in lines that end with a carriage return."""
    stdout = _stream(process.stdout)
    while chunk := await stdout.read(_COMPLAINT_BYTES):
        if found := _BYTES_SO_FAR.match(chunk.rpartition(b"\r")[2]):
            progress(min(int(found[1]), total), total)


async def _complaint(process: Process) -> str:
    """The beginning of stderr; the rest is read and dropped, so that rsync never waits for a reader."""
    stderr = _stream(process.stderr)
    kept = bytearray()
    while chunk := await stderr.read(_COMPLAINT_BYTES):
        kept += chunk[: _COMPLAINT_BYTES - len(kept)]
    return kept.decode(errors="replace").strip()


def _stream(stream: StreamReader | None) -> StreamReader:
    assert stream is not None  # noqa: S101 - a pipe was asked for
    return stream
