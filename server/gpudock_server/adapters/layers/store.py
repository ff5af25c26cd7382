"""LayerStore over the folders of Docker's overlay2 driver."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from gpudock_server.adapters.host.disk_space import available, require_disk_space
from gpudock_server.adapters.host.disk_usage import du_unavailable_reason, tree_bytes, tree_entries
from gpudock_server.adapters.host.privileges import copy_unavailable_reason, exchange_unavailable_reason
from gpudock_server.adapters.host.stalls import DEFAULT_STALL_SECONDS, StalledError
from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.host.trees.jobs import JobRefusedError
from gpudock_server.adapters.host.trees.limits import Limits, TreeTooLargeError
from gpudock_server.adapters.host.trees.worker import run_job
from gpudock_server.adapters.layers.accounts import read_accounts
from gpudock_server.adapters.layers.commit_progress import track_commit
from gpudock_server.adapters.layers.exchange import LayerOrder, ensure_order, layer_order
from gpudock_server.adapters.layers.overlay2 import Layer, LayerRefusedError, find_layer, layer_of
from gpudock_server.errors import DiskFull, LayerCarryFailed
from gpudock_server.model.engine import EngineContainer, EngineImage, ImageAccounts
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.ports import CommitCost, LayerPair, LayerStore, LayerTransferPlan, Progress

_MEASURE_SECONDS = 300.0
_NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})

LOST_BY_COMMIT = (
    "extended attributes other than security.capability are lost (user.* ones among them)",
    "times of modification lose their fraction of a second, and those before 1970 become 1970",
    "sparse files are written out in full",
    "sockets, and the mode, owner and time of / itself, are not carried",
)
# Where the layer is out of reach, so that nobody can tell whether there are any.
LONG_PATHS_LOST = "files whose paths are longer than some 3900 bytes are left out of the image by the engine"
# limits.h, with the final zero.
_PATH_MAX = 4096
# The engine may reach the same files by a name of the layer that is a little longer, such as merged for diff.
_PATH_MARGIN = 16
COMMIT_WARNINGS = (*LOST_BY_COMMIT, "the container's image grows by one layer; before it has 100, they are made fewer")


class OverlayLayerStore(LayerStore):
    """Carries writable layers by exchange or copy of overlay2 folders, and plans a commit where neither can be.

    `forced` is the one method to use, None the best there is. `engine_root` is the engine's data folder, as the engine
    names it; `local` whether the engine runs on this host, so that its paths are ours. Nothing is kept open, and any
    number of carries may run at once. A copy that makes no progress for `stall_seconds` is ended and fails.
    """

    def __init__(
        self,
        forced: LayerTransferMethod | None,
        engine_root: str,
        *,
        local: bool,
        stall_seconds: float = DEFAULT_STALL_SECONDS,
    ) -> None:
        self._forced: LayerTransferMethod | None = None if forced is LayerTransferMethod.NONE else forced
        self._root = engine_root
        self._local = local
        self._stall_seconds = stall_seconds

    async def methods(self) -> tuple[tuple[LayerTransferMethod, str], ...]:
        """Each method, and why it cannot be used on this host (empty: it can)."""
        hidden = await run_to_end(self._layers_unavailable_reason)
        return (
            (LayerTransferMethod.EXCHANGE, hidden or exchange_unavailable_reason()),
            (LayerTransferMethod.COPY, hidden or copy_unavailable_reason() or du_unavailable_reason()),
            (LayerTransferMethod.COMMIT, ""),
        )

    async def plan(self, old: EngineContainer) -> LayerTransferPlan:
        """The forced method, else the best; measures what would be copied. Raises LayerCarryFailed, DiskFull.

        The container may still run. What stood in the way of a better method is among the warnings.
        """
        layer = await run_to_end(self._layer_of, old)
        hidden = layer if isinstance(layer, str) else ""
        reasons = {method: reason or hidden for method, reason in await self.methods()}
        reasons[LayerTransferMethod.COMMIT] = ""
        if self._forced:
            if reason := reasons[self._forced]:
                raise LayerCarryFailed(method=self._forced, detail=reason)
            plan = LayerTransferPlan(method=self._forced)
        else:
            plan = _best(reasons)
        match plan.method:
            case LayerTransferMethod.COPY:
                return await self._measured(plan, old.upper_dir, apparent=False)
            case LayerTransferMethod.COMMIT:
                return await self._commit_plan(plan, "" if hidden else old.upper_dir)
            case _:
                return plan.model_copy(update={"bytes_available": available(self._root)})

    async def accounts(self, image: EngineImage, upper_dir: str = "") -> ImageAccounts | None:
        """See the protocol."""
        if not self._local or not image.layer_paths:
            return None
        upper = (upper_dir,) if upper_dir else ()
        return await run_to_end(read_accounts, self._root, (*upper, *image.layer_paths))

    async def commit_plan(self, container: EngineContainer) -> LayerTransferPlan:
        """See the protocol. Raises LayerCarryFailed, DiskFull."""
        layer = await run_to_end(self._layer_of, container)
        upper = "" if isinstance(layer, str) else container.upper_dir
        plan = await self._commit_plan(LayerTransferPlan(method=LayerTransferMethod.COMMIT), upper)
        return plan.model_copy(update={"warnings": LOST_BY_COMMIT})

    async def commit_cost(self, container: EngineContainer) -> CommitCost:
        """See the protocol."""
        layer = await run_to_end(self._layer_of, container)
        if isinstance(layer, str) or du_unavailable_reason():
            return CommitCost(warnings=LOST_BY_COMMIT)
        await self.require_committable(container)
        with _layer_errors(LayerTransferMethod.COMMIT):
            apparent, allocated, entries = await asyncio.gather(
                tree_bytes(container.upper_dir, apparent=True, timeout_seconds=_MEASURE_SECONDS),
                tree_bytes(container.upper_dir, apparent=False, timeout_seconds=_MEASURE_SECONDS),
                tree_entries(container.upper_dir, timeout_seconds=_MEASURE_SECONDS),
            )
            free = await run_to_end(require_disk_space, container.upper_dir, apparent)
        return CommitCost(
            measured=True,
            apparent_bytes=apparent,
            allocated_bytes=allocated,
            entries=entries,
            bytes_available=free,
            warnings=LOST_BY_COMMIT,
        )

    async def require_committable(self, container: EngineContainer) -> None:
        """See the protocol."""
        layer = await run_to_end(self._layer_of, container)
        if not isinstance(layer, str):
            await self._require_short_paths(container.upper_dir)

    async def _require_short_paths(self, upper_dir: str) -> None:
        """The engine reaches the files of a layer by path, and leaves out what it cannot reach without an error."""
        with _layer_errors(LayerTransferMethod.COMMIT):
            found = await run_job(
                "longest_path",
                memory_bytes=Limits().memory_bytes,
                stall_seconds=self._stall_seconds,
                source=[upper_dir, 0, 0],
            )
            longest, most = int(found["bytes"]), _PATH_MAX - len(os.fsencode(upper_dir)) - _PATH_MARGIN
            if longest > most:
                raise LayerRefusedError(
                    f"a path in the container's files is {longest} bytes long; the engine would leave out of an image"
                    f" what lies beyond {most} bytes"
                )

    @asynccontextmanager
    async def report_commit_progress(
        self, container: EngineContainer, total: int, progress: Progress
    ) -> AsyncIterator[None]:
        """See the protocol."""
        layer = await run_to_end(self._layer_of, container)
        if isinstance(layer, str) or not total:
            yield
            return
        async with track_commit(self._root, layer.image_layers, total, progress):
            yield

    async def locate(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
        """See the protocol. Raises LayerCarryFailed; changes nothing."""
        method = self._forced or LayerTransferMethod.EXCHANGE
        with _layer_errors(method):
            return await run_to_end(self._located, old, new)

    async def exchange(self, pair: LayerPair) -> bool:
        """See the protocol."""
        with _layer_errors(LayerTransferMethod.EXCHANGE):
            return await run_to_end(ensure_order, self._root, pair, LayerOrder.EXCHANGED)

    async def exchange_back(self, pair: LayerPair) -> None:
        """See the protocol. The successor may be gone, as long as the old tree is where it was."""
        with _layer_errors(LayerTransferMethod.EXCHANGE):
            if not await run_to_end(self._restore_order, pair):
                raise LayerRefusedError("the kernel swapped the layers once and does not swap them back")

    async def copy(self, pair: LayerPair, progress: Progress) -> None:
        """See the protocol. On return the copy is on the disk, not only in memory."""
        with _layer_errors(LayerTransferMethod.COPY):
            # Emptying the new tree of an exchanged pair would destroy the only copy.
            if await run_to_end(layer_order, self._root, pair) is not LayerOrder.STRAIGHT:
                raise LayerRefusedError("the layers are exchanged, and what would be emptied is the old one")
            if reason := copy_unavailable_reason() or du_unavailable_reason():
                raise LayerRefusedError(reason)
            await self._copy(pair, progress)

    async def _copy(self, pair: LayerPair, progress: Progress) -> None:
        plan = await self._measured(LayerTransferPlan(method=LayerTransferMethod.COPY), pair.old_path, apparent=False)
        total = plan.bytes_to_move
        progress(0, total)
        device = find_layer(self._root, pair.new_path).device
        try:
            await run_job(
                "fill",
                progress,
                memory_bytes=Limits().memory_bytes,
                stall_seconds=self._stall_seconds,
                source=[pair.old_path, device, pair.old_inode],
                target=[pair.new_path, device, pair.new_inode],
                hidden=f".gpudock-{secrets.token_hex(16)}",
                total=total,
                clones=True,
            )
        except OSError as error:
            if error.errno not in _NO_SPACE_ERRNOS:
                raise
            free = available(pair.new_path)
            raise DiskFull(path=pair.new_path, needed_bytes=total, available_bytes=free) from error
        progress(total, total)

    async def _commit_plan(self, plan: LayerTransferPlan, upper_dir: str) -> LayerTransferPlan:
        """What the engine will write is what reading the layer gives; unknown where the layer is not ours to see."""
        plan = plan.model_copy(update={"warnings": (*plan.warnings, *COMMIT_WARNINGS)})
        if not upper_dir:
            return plan.model_copy(update={"warnings": (*plan.warnings, LONG_PATHS_LOST)})
        await self._require_short_paths(upper_dir)
        if du_unavailable_reason():
            return plan
        return await self._measured(plan, upper_dir, apparent=True)

    async def _measured(self, plan: LayerTransferPlan, path: str, *, apparent: bool) -> LayerTransferPlan:
        """The plan with the bytes that it moves and the room for them. Raises DiskFull."""
        with _layer_errors(plan.method):
            needed = await tree_bytes(path, apparent=apparent, timeout_seconds=_MEASURE_SECONDS)
            free = await run_to_end(require_disk_space, path, needed)
        return plan.model_copy(update={"bytes_to_move": needed, "bytes_available": free})

    def _layers_unavailable_reason(self) -> str:
        """Why no layer of this engine can be seen from here; empty when they can."""
        if not self._local:
            return "the engine runs on another host"
        if not Path(self._root, "overlay2", "l").is_dir():
            return f"there are no overlay2 layers below {self._root}, the engine's data folder"
        return ""

    def _layer_of(self, container: EngineContainer) -> Layer | str:
        """A container's writable layer, or why it is not to be seen."""
        return layer_of(self._root, container, local=self._local)

    def _located(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
        if not old.image_id or old.image_id != new.image_id:
            raise LayerRefusedError(f"the images differ: {old.image_id or 'unknown'} and {new.image_id or 'unknown'}")
        layers = [self._layer_of(old), self._layer_of(new)]
        match layers:
            case [Layer() as before, Layer() as after]:
                _check_together(before, after)
                return LayerPair(
                    old_path=before.path, old_inode=before.inode, new_path=after.path, new_inode=after.inode
                )
            case _:
                raise LayerRefusedError("; ".join(layer for layer in layers if isinstance(layer, str)))

    def _restore_order(self, pair: LayerPair) -> bool:
        if pair.old_inode != pair.new_inode and find_layer(self._root, pair.old_path).inode == pair.old_inode:
            return True
        return ensure_order(self._root, pair, LayerOrder.STRAIGHT)


def _best(reasons: dict[LayerTransferMethod, str]) -> LayerTransferPlan:
    """The first method that nothing speaks against, with what speaks against those before it."""
    method = next(method for method, reason in reasons.items() if not reason)
    warnings = [f"{other} is not possible: {reason}" for other, reason in reasons.items() if reason]
    return LayerTransferPlan(method=method, warnings=tuple(warnings))


def _check_together(old: Layer, new: Layer) -> None:
    if (old.path, old.inode) == (new.path, new.inode) or old.inode == new.inode:
        raise LayerRefusedError(f"{old.path} and {new.path} are one and the same layer")
    if old.device != new.device:
        raise LayerRefusedError(f"{old.path} and {new.path} lie on different filesystems")
    if old.image_layers != new.image_layers:
        raise LayerRefusedError(f"{old.path} and {new.path} lie on different image layers")


@contextmanager
def _layer_errors(method: LayerTransferMethod) -> Iterator[None]:
    """Give what is refused or fails below the name that core knows."""
    try:
        yield
    except (LayerRefusedError, JobRefusedError, TreeTooLargeError, StalledError, ValueError) as error:
        raise LayerCarryFailed(method=method, detail=str(error)) from error
    except TimeoutError as error:
        raise LayerCarryFailed(method=method, detail="the layer could not be measured in time") from error
    except OSError as error:
        raise LayerCarryFailed(method=method, detail=f"{error.strerror} ({error.filename})") from error
