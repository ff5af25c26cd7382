"""LayerStore for the folders of Docker's overlay2 driver."""

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
    "modification times are cut to whole seconds; those before 1970 become 1970",
    "sparse files are written out in full",
    "sockets, and the mode, owner and time of /, are not copied",
)
# Added if the layer is not accessible, so that its paths cannot be checked.
LONG_PATHS_LOST = "files with paths longer than about 3900 bytes are left out of the image"
# limits.h; includes the final zero byte.
_PATH_MAX = 4096
# The engine may use another path of the layer that is a little longer, such as merged instead of diff.
_PATH_MARGIN = 16
COMMIT_WARNINGS = (*LOST_BY_COMMIT, "the container's image gets one more layer; layers are merged before there are 100")


class OverlayLayerStore(LayerStore):
    """Implements ports.LayerStore by exchanging or copying overlay2 folders; plans a commit if neither is possible.

    `forced` is the only method to use; None: the best. `engine_root` is the engine's data folder as the engine reports
    it; `local`: the engine runs on this host, so that its paths are valid here. Any number of transfers may run
    concurrently. A copy fails if it makes no progress for `stall_seconds`.
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
        """See the protocol."""
        unavailable = await run_to_end(self._layers_unavailable_reason)
        return (
            (LayerTransferMethod.EXCHANGE, unavailable or exchange_unavailable_reason()),
            (LayerTransferMethod.COPY, unavailable or copy_unavailable_reason() or du_unavailable_reason()),
            (LayerTransferMethod.COMMIT, ""),
        )

    async def plan(self, old: EngineContainer) -> LayerTransferPlan:
        """Return the forced method, else the best, with the measured cost. Raises LayerCarryFailed, DiskFull.

        The container may still run. The warnings say why better methods are not possible.
        """
        layer = await run_to_end(self._layer_of, old)
        unavailable = layer if isinstance(layer, str) else ""
        reasons = {method: reason or unavailable for method, reason in await self.methods()}
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
                return await self._commit_plan(plan, "" if unavailable else old.upper_dir)
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
        """Raise LayerRefusedError for paths that are too long: the engine leaves such files out without an error."""
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
                    f"a path in the container is {longest} bytes long; the engine leaves paths over {most} bytes out of"
                    " an image"
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
        """See the protocol. The successor need not exist if the old tree is in its place."""
        with _layer_errors(LayerTransferMethod.EXCHANGE):
            if not await run_to_end(self._restore_order, pair):
                raise LayerRefusedError("cannot exchange the layers back: the kernel refuses it")

    async def copy(self, pair: LayerPair, progress: Progress) -> None:
        """See the protocol. Returns after the copy is on disk."""
        with _layer_errors(LayerTransferMethod.COPY):
            # Emptying the new path of an exchanged pair would delete the only copy of the files.
            if await run_to_end(layer_order, self._root, pair) is not LayerOrder.STRAIGHT:
                raise LayerRefusedError("the layers are already exchanged; copying would delete the source")
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
        """Add the warnings and the cost of a commit to a plan; the cost is unknown if the layer is not accessible."""
        plan = plan.model_copy(update={"warnings": (*plan.warnings, *COMMIT_WARNINGS)})
        if not upper_dir:
            return plan.model_copy(update={"warnings": (*plan.warnings, LONG_PATHS_LOST)})
        await self._require_short_paths(upper_dir)
        if du_unavailable_reason():
            return plan
        return await self._measured(plan, upper_dir, apparent=True)

    async def _measured(self, plan: LayerTransferPlan, path: str, *, apparent: bool) -> LayerTransferPlan:
        """Return the plan with the measured bytes and the free bytes. Raises DiskFull, LayerCarryFailed."""
        with _layer_errors(plan.method):
            needed = await tree_bytes(path, apparent=apparent, timeout_seconds=_MEASURE_SECONDS)
            free = await run_to_end(require_disk_space, path, needed)
        return plan.model_copy(update={"bytes_to_move": needed, "bytes_available": free})

    def _layers_unavailable_reason(self) -> str:
        """Why the layers of this engine are not accessible; empty if they are."""
        if not self._local:
            return "the engine runs on another host"
        if not Path(self._root, "overlay2", "l").is_dir():
            return f"no overlay2 layers below the engine's data folder {self._root}"
        return ""

    def _layer_of(self, container: EngineContainer) -> Layer | str:
        """Return a container's writable layer, or why it is not accessible."""
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
    """Return the first possible method, with warnings that say why those before it are not possible."""
    method = next(method for method, reason in reasons.items() if not reason)
    warnings = [f"{other} is not possible: {reason}" for other, reason in reasons.items() if reason]
    return LayerTransferPlan(method=method, warnings=tuple(warnings))


def _check_together(old: Layer, new: Layer) -> None:
    if (old.path, old.inode) == (new.path, new.inode) or old.inode == new.inode:
        raise LayerRefusedError(f"{old.path} and {new.path} are the same layer")
    if old.device != new.device:
        raise LayerRefusedError(f"{old.path} and {new.path} are on different filesystems")
    if old.image_layers != new.image_layers:
        raise LayerRefusedError(f"{old.path} and {new.path} are on different image layers")


@contextmanager
def _layer_errors(method: LayerTransferMethod) -> Iterator[None]:
    """Convert errors of layers and jobs to LayerCarryFailed."""
    try:
        yield
    except (LayerRefusedError, JobRefusedError, TreeTooLargeError, StalledError, ValueError) as error:
        raise LayerCarryFailed(method=method, detail=str(error)) from error
    except TimeoutError as error:
        raise LayerCarryFailed(method=method, detail="measuring the layer timed out") from error
    except OSError as error:
        raise LayerCarryFailed(method=method, detail=f"{error.strerror} ({error.filename})") from error
