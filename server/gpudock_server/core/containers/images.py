"""Who may use and who may replace an image of a node's engine.

The engine knows neither owners nor where an image came from, so gpudock keeps that itself: an `ImageOrigin` in the
store for each image that gpudock committed, or pulled with credentials. A record in the store and not a label: the
author of an image chooses its labels.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from gpudock_server.core.containers.commands import PullPolicy
from gpudock_server.core.operations.saga import OperationRun, StepResult
from gpudock_server.errors import (
    FieldViolation,
    ImageExists,
    ImageNameForbidden,
    ImageNotFound,
    ImagePullFailed,
    InvalidArgument,
)
from gpudock_server.model.container import Container
from gpudock_server.model.engine import EngineImage, ImageAccounts, RegistryAuth
from gpudock_server.model.image import ImageOrigin, familiar_reference, familiar_repository
from gpudock_server.model.record import Record, now
from gpudock_server.model.store_changes import DeleteImageOrigin, PutImageOrigin
from gpudock_server.ports import Engine, LayerStore, Store

# A pull that has been silent for so long says so.
_STALL_NOTICE_SECONDS: Final = 5.0
OWNER_PLACEHOLDER: Final = "{owner}"
_OWNER_IN_REPOSITORY: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


class ImageNameLocks:
    """Keeps a commit from taking a name that a pull is about to give to another image.

    The engine has no compare-and-set for names. All pulls and commits of an engine go through one daemon, so it is
    enough that this process does not let the two overlap.
    """

    def __init__(self) -> None:
        self._pulls: dict[str, int] = {}
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def pull_lock(self, reference: str) -> AsyncIterator[None]:
        """While entered, nothing is committed under this name."""
        name = familiar_reference(reference)
        async with self._lock:
            self._pulls[name] = self._pulls.get(name, 0) + 1
        try:
            yield
        finally:
            self._pulls[name] -= 1
            if not self._pulls[name]:
                del self._pulls[name]

    @asynccontextmanager
    async def commit_lock(self, reference: str) -> AsyncIterator[None]:
        """While entered, no pull begins and no other commit takes a name. Raises ImageExists while it is pulled."""
        async with self._lock:
            self.require_not_pulled(reference)
            yield

    def require_not_pulled(self, reference: str) -> None:
        """Raises ImageExists while a pull of this name is under way."""
        if familiar_reference(reference) in self._pulls:
            raise ImageExists(image=reference, detail="it is being pulled")


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What the operator allows.

    `replace_any`: a caller may replace images that gpudock did not commit for the container's owner. `repositories`:
    the names, with all below them, that can be committed; empty is any. `verify_access`: restricted images are pulled
    again for other owners. `pull_stall_seconds`: how long a pull may make no progress.
    """

    replace_any: bool = False
    repositories: tuple[str, ...] = ()
    verify_access: bool = False
    pull_stall_seconds: float = 300.0
    names: ImageNameLocks = field(default_factory=ImageNameLocks)

    def require_allowed(self, repository: str, owner: str) -> None:
        """Raises ImageNameForbidden where an owner's container may not be committed as this repository."""
        if not self.repositories:
            return
        allowed = tuple(name for prefix in self.repositories if (name := _for_owner(prefix, owner)))
        wanted = familiar_repository(repository)
        if not any(wanted == name or wanted.startswith(f"{name}/") for name in allowed):
            raise ImageNameForbidden(repository=repository, allowed=allowed)


def _for_owner(prefix: str, owner: str) -> str:
    """A prefix with the owner filled in; empty where this owner has no such name.

    An owner with a slash would reach below another owner's prefix, and one with capitals cannot be part of a name.
    """
    if OWNER_PLACEHOLDER in prefix:
        if not owner or not _OWNER_IN_REPOSITORY.issuperset(owner):
            return ""
        prefix = prefix.replace(OWNER_PLACEHOLDER, owner)
    return familiar_repository(prefix)


@dataclass(frozen=True, slots=True)
class CommitName:
    """The name that a commit is to give its image. `replace`: the caller wants to replace what is not the owner's."""

    reference: str
    owner: str
    replace: bool


@dataclass(frozen=True, slots=True)
class ImageChoice:
    """`image_id` is to be used; empty: the image has to be pulled first. `present_id` is what has the name by then."""

    image_id: str
    present_id: str = ""


@dataclass(frozen=True, slots=True)
class Pull:
    """An image to be pulled for an owner. `auth` None: without credentials, or resumed, when they are lost.

    `authenticated`: the caller gave credentials. `present_id` is the image that had the name before: it was not pulled
    with these credentials, so that a pull with needless or wrong ones does not take it from all others.
    `stall_seconds` None is the node's own.
    """

    reference: str
    owner: str
    auth: RegistryAuth | None
    authenticated: bool
    present_id: str
    stall_seconds: float | None = None


class PulledImage(Record):
    """The result of a pull."""

    image_id: str


PULLED = StepResult("pull", PulledImage)


@dataclass(frozen=True, slots=True)
class Images:
    """The images of a node's engine, and who may use and replace them."""

    store: Store
    engine: Engine
    layers: LayerStore
    node: str
    policy: ImagePolicy

    async def find_replaceable(self, name: CommitName) -> str:
        """The id of the image that has the name now and may lose it; empty where there is none. Raises ImageExists."""
        reference = name.reference
        self.policy.names.require_not_pulled(reference)
        repository, _, tag = reference.rpartition(":")
        found = await self.engine.image(reference)
        if found is None:
            # `docker run 0a1b2c3d4e5f` finds a name before an image's id.
            if tag == "latest" and await self.engine.image(repository) is not None:
                raise ImageExists(image=repository, detail="it is the id of an image; choose another repository")
            return ""
        origin = await self.store.image_origin(self.node, found.id)
        committed = origin is not None and origin.committed_as == familiar_reference(reference)
        if committed and origin is not None and origin.committed_for == name.owner:
            return found.id
        if name.replace and self.policy.replace_any:
            return found.id
        owner = f"a container of owner {name.owner!r}" if name.owner else "a container without an owner"
        own = f"a commit of {owner} may replace only an image that such a commit made under this name"
        rest = (
            "; `replace` does not change that on this node (setting commit_replace)"
            if name.replace
            else "; choose another name, or set `replace`, which the setting commit_replace has to allow"
        )
        raise ImageExists(image=reference, detail=f"{own}{rest}")

    def committed_origin(self, image_id: str, name: CommitName) -> PutImageOrigin:
        """What is recorded of an image that was committed."""
        return PutImageOrigin(
            ImageOrigin(
                node=self.node,
                image_id=image_id,
                committed_as=familiar_reference(name.reference),
                committed_for=name.owner,
                restricted=bool(name.owner),
                owners=(name.owner,) if name.owner else (),
                update_time=now(),
            )
        )

    async def choose(self, reference: str, policy: PullPolicy, owner: str) -> ImageChoice:
        """Whether the image that the engine has can be used. Raises ImageNotFound."""
        found = await self.engine.image(reference)
        present = found.id if found else ""
        if policy is PullPolicy.ALWAYS:
            return ImageChoice("", present)
        if found is not None and await self.may_use(found.id, owner):
            return ImageChoice(found.id, present)
        if policy is PullPolicy.NEVER:
            # The same words for what is there and what is not: another owner's images are not told.
            raise ImageNotFound(image=reference)
        return ImageChoice("", present)

    async def require_user(self, image_id: str, reference: str, user: str) -> None:
        """Raise InvalidArgument where an image that the engine has lacks the user, or the group, that a spec names.

        What cannot be known passes: an image still to be pulled, and layers that this daemon does not reach.
        """
        if not user or not image_id:
            return
        image = await self.engine.image(image_id)
        if image is not None:
            _require(await self.layers.accounts(image), user, f"image {reference!r}")

    async def require_user_in_files(self, container: Container, user: str) -> None:
        """Raise InvalidArgument where the files of a container, as they are now, lack the user or group of a spec.

        What cannot be known passes, as with `require_user`.
        """
        if not user or container.engine is None:
            return
        seen = await self.engine.inspect(container.engine.engine_id)
        if seen is None or not seen.upper_dir:
            return
        image = await self.engine.image(seen.image_id)
        if image is not None:
            accounts = await self.layers.accounts(image, seen.upper_dir)
            _require(accounts, user, f"container {container.name!r}")

    async def may_use(self, image_id: str, owner: str) -> bool:
        """Whether an owner may make containers of an image that the engine has, without showing it to the registry."""
        if not self.policy.verify_access:
            return True
        origin = await self.store.image_origin(self.node, image_id)
        return origin is None or not origin.restricted or owner in origin.owners

    async def pull(self, run: OperationRun, pull: Pull) -> EngineImage:
        """Pull, and record who has shown that they may use it. Raises ImagePullFailed, ImageNotFound."""
        async with self.policy.names.pull_lock(pull.reference):
            await self._pull_with_stall_timeout(run, pull)
            image = await self.engine.image(pull.reference)
        if image is None:
            raise ImageNotFound(image=pull.reference)
        await self._record_pull(image.id, (pull.owner,), restricted=pull.authenticated and image.id != pull.present_id)
        return image

    async def _pull_with_stall_timeout(self, run: OperationRun, pull: Pull) -> None:
        seconds = pull.stall_seconds or self.policy.pull_stall_seconds
        monitor = _StallMonitor(run, seconds)
        watching = asyncio.create_task(monitor.describe_stalls())
        try:
            async with monitor.stall_timeout:
                await self.engine.pull(pull.reference, pull.auth, monitor.on_progress)
        except TimeoutError:
            if not monitor.stall_timeout.expired():
                raise
            detail = f"no progress for {seconds:g} s, since {monitor.last_time}"
            raise ImagePullFailed(image=pull.reference, detail=detail) from None
        finally:
            watching.cancel()

    async def restrict_after_failed_pull(self, pull: Pull) -> None:
        """Undo a pull with credentials: an image that came stays, and may be used by nobody until it is pulled again.

        A daemon that was killed may have left behind an image that it did not record, and a resumed pull has no
        credentials to show.
        """
        image = await self.engine.image(pull.reference) if pull.authenticated else None
        if image is not None and image.id != pull.present_id:
            await self._record_pull(image.id, (), restricted=True)

    async def _record_pull(self, image_id: str, owners: tuple[str, ...], *, restricted: bool) -> None:
        before = await self.store.image_origin(self.node, image_id)
        if before is None and not restricted:
            return
        origin = before or ImageOrigin(node=self.node, image_id=image_id, update_time=now())
        changed = origin.model_copy(
            update={
                "restricted": origin.restricted or restricted,
                "owners": (*origin.owners, *(owner for owner in owners if owner not in origin.owners)),
            }
        )
        if changed != before:
            await self.store.apply([PutImageOrigin(changed.model_copy(update={"update_time": now()}))])

    async def delete_stale_origins(self) -> None:
        """Drop the records of images that the engine no longer has."""
        # The records first: what is recorded later is in the engine, and not in this list.
        recorded = [origin.image_id for origin in await self.store.image_origins(self.node)]
        if not recorded:
            return
        there = frozenset(await self.engine.image_ids())
        for image_id in recorded:
            if image_id not in there:
                await self.store.apply([DeleteImageOrigin(self.node, image_id)])


def _require(accounts: ImageAccounts | None, user: str, what: str) -> None:
    if accounts is not None and (missing := accounts.missing(user)):
        description = f"{what} has no {missing}; use a name of its /etc/passwd and /etc/group, or a number"
        raise InvalidArgument(violations=(FieldViolation(field="spec.user", description=description),))


class _StallMonitor:
    """When a pull last moved: tells it to watchers, and ends the pull after `seconds` without."""

    def __init__(self, run: OperationRun, seconds: float) -> None:
        self._run = run
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self.stall_timeout = asyncio.timeout(seconds)
        self.last_time = _time_text()

    def on_progress(self, current_bytes: int, total_bytes: int) -> None:
        """Called at every sign of progress."""
        self._last, self.last_time = self._loop.time(), _time_text()
        self.stall_timeout.reschedule(self._last + self._seconds)
        self._run.set_stage_message("")
        self._run.progress(current_bytes, total_bytes)

    async def describe_stalls(self) -> None:
        """Say since when there is no progress, where that is worth a word."""
        quiet = min(_STALL_NOTICE_SECONDS, self._seconds / 2)
        while True:
            left = self._last + quiet - self._loop.time()
            if left <= 0:
                self._run.set_stage_message(
                    f"no progress of the pull since {self.last_time}; it fails {self._seconds:g} s after that"
                )
            await asyncio.sleep(max(left, _STALL_NOTICE_SECONDS / 10))


def _time_text() -> str:
    return now().isoformat(timespec="seconds")
