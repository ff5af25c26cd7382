"""ports.VolumeCopier with the tree mirror: copy while the source is in use, copy the rest, then verify both."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpudock_server.adapters.host.privileges import copy_unavailable_reason
from gpudock_server.adapters.host.stalls import DEFAULT_STALL_SECONDS, StalledError
from gpudock_server.adapters.host.subprocesses import ProgramFailed
from gpudock_server.adapters.host.trees.jobs import JobRefusedError
from gpudock_server.adapters.host.trees.limits import DEFAULT_MAX_ENTRIES, MAX_NAME_BYTES, Limits, TreeTooLargeError
from gpudock_server.adapters.host.trees.worker import TreeWorker, run_job
from gpudock_server.adapters.volumes.failures import volume_errors
from gpudock_server.adapters.volumes.private_mounts import MountableBackend, MountedView, mount_privately
from gpudock_server.errors import VolumeFailed
from gpudock_server.model.volume import TreeSummary, VolumeBacking
from gpudock_server.ports import Progress, VolumeCopier


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two backings that are mounted in one namespace."""

    view: MountedView
    source: Path
    target: Path

    @property
    def old(self) -> str:
        """Return the path of the source's root in our namespace."""
        return self.view.path(self.source)

    @property
    def new(self) -> str:
        """Return the path of the target's root in our namespace."""
        return self.view.path(self.target)


class MirrorVolumeCopier(VolumeCopier):
    """Implements ports.VolumeCopier between backings of any of `backends`, mounted or not.

    A child process walks both trees relative to directory descriptors (`host.trees.mirror`). The index of the copied
    files is kept in a folder of the target until the final copy.
    """

    def __init__(self, backends: Iterable[MountableBackend], stall_seconds: float = DEFAULT_STALL_SECONDS) -> None:
        """A copy or a comparison fails if it makes no progress for `stall_seconds`."""
        self._backends = {backend.kind: backend for backend in backends}
        self._stall_seconds = stall_seconds

    async def copy(self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, final: bool) -> None:
        """See the protocol. Files of the target that the source does not have are deleted."""
        async with self._both("copy", source, target) as pair:
            with volume_errors("copy", source.name, Path(pair.new), source.size_bytes), _job_errors():
                if reason := copy_unavailable_reason():
                    raise ProgramFailed(reason)
                measured = await run_job(
                    "measure", memory_bytes=Limits().memory_bytes, stall_seconds=self._stall_seconds,
                    source=[pair.old], previous="", limits=None,
                )  # fmt: skip
                total = int(measured["bytes"])
                progress(0, total)
                await run_job(
                    "mirror", lambda current, _: progress(min(current, total), total),
                    memory_bytes=_index_memory(int(measured["entries"])), stall_seconds=self._stall_seconds,
                    source=[pair.old], target=[pair.new], hidden=f".gpudock-{target.uid}", still=final, quiet=final,
                    limits=None, total=total, durable=True,
                )  # fmt: skip
                progress(total, total)

    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        """See the protocol."""
        async with self._both("verify", source, target) as pair:
            with volume_errors("verify", source.name, Path(pair.new)), _job_errors():
                worker = TreeWorker(Limits().memory_bytes, self._stall_seconds)
                try:
                    # One after the other, because both are on the same disk.
                    before = TreeSummary(**await worker.call("digest", root=pair.old))
                    after = TreeSummary(**await worker.call("digest", root=pair.new))
                    if before == after:
                        return before
                    found = (await worker.call("differences", old=pair.old, new=pair.new))["found"]
                finally:
                    await worker.close()
        detail = f"the copy differs from the source: {'; '.join(found) or 'the content of a file'}"
        raise VolumeFailed(volume=source.name, call="verify", detail=detail)

    @asynccontextmanager
    async def _both(self, call: str, source: VolumeBacking, target: VolumeBacking) -> AsyncIterator[_Pair]:
        if source.uid == target.uid:
            raise VolumeFailed(volume=source.name, call=call, detail="source and target are the same volume backing")
        old = await self._backends[source.kind].files_location(source)
        new = await self._backends[target.kind].files_location(target)
        async with AsyncExitStack() as stack:
            with volume_errors(call, source.name, new.path.parent):
                mounts = [one.mount for one in (old, new) if one.mount is not None]
                view = await stack.enter_async_context(mount_privately(mounts))
            yield _Pair(view=view, source=old.path, target=new.path)


@contextmanager
def _job_errors() -> Iterator[None]:
    """Convert the errors of tree jobs to ProgramFailed, which `volume_errors` handles."""
    try:
        yield
    except (JobRefusedError, StalledError, TreeTooLargeError) as error:
        raise ProgramFailed(str(error)) from error


def _index_memory(entries: int) -> int:
    """Return the address space in bytes for the index of a tree that may grow to twice as many entries.

    The owner of a volume decides how many files it has, so the limit is half of the machine's memory; it is at least
    that of a container's layer.
    """
    least = Limits().memory_bytes
    expected = max(DEFAULT_MAX_ENTRIES, 2 * entries)
    names = MAX_NAME_BYTES * expected // DEFAULT_MAX_ENTRIES
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(least, min(half, Limits(entries=expected, name_characters=names).memory_bytes))
