"""Images of a node's engine: who may use them, who may replace them, and how they are pulled.

The engine knows neither the owner nor the origin of an image. gpudock therefore keeps an `ImageOrigin` in the store for
each image that it committed, or pulled with credentials. Labels cannot be used: the author of an image chooses them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from gpudock_server.core.containers.commands import PullPolicy
from gpudock_server.core.operations.saga import OperationRun, Step, StepResult
from gpudock_server.errors import (
    FieldViolation,
    ImageExists,
    ImageNameForbidden,
    ImageNotFound,
    ImagePullFailed,
    InvalidArgument,
)
from gpudock_server.model.container import Container
from gpudock_server.model.engine import ImageAccounts, RegistryAuth
from gpudock_server.model.image import ImageOrigin, familiar_reference, familiar_repository
from gpudock_server.model.record import Record, now
from gpudock_server.model.store_changes import DeleteImageOrigin, PutImageOrigin
from gpudock_server.ports import Engine, LayerStore, Store

# A pull without progress for this long reports it in its stage.
_STALL_NOTICE_SECONDS: Final = 5.0
OWNER_PLACEHOLDER: Final = "{owner}"
_OWNER_IN_REPOSITORY: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


class ImageNameLocks:
    """Prevents that a commit takes a name while a pull gives it to another image.

    The engine has no compare-and-set for names. All pulls and commits of an engine go through one daemon, so locks in
    this process are enough.
    """

    def __init__(self) -> None:
        self._pulls: dict[str, int] = {}
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def pull_lock(self, reference: str) -> AsyncIterator[None]:
        """Prevents commits under this name while entered."""
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
        """Prevents new pulls and other commits while entered. Raises ImageExists if this name is being pulled."""
        async with self._lock:
            self.require_not_pulled(reference)
            yield

    def require_not_pulled(self, reference: str) -> None:
        """Raise ImageExists if this name is being pulled."""
        if familiar_reference(reference) in self._pulls:
            raise ImageExists(image=reference, detail="it is being pulled")


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What the operator allows.

    `replace_any`: callers may replace images that gpudock did not commit for the container's owner. `repositories`: the
    names, and all names below them, that can be committed; empty: any. `verify_access`: restricted images are pulled
    again for other owners. `pull_stall_seconds`: how long a pull may make no progress.
    """

    replace_any: bool = False
    repositories: tuple[str, ...] = ()
    verify_access: bool = False
    pull_stall_seconds: float = 300.0
    names: ImageNameLocks = field(default_factory=ImageNameLocks)

    def require_allowed(self, repository: str, owner: str) -> None:
        """Raise ImageNameForbidden if an owner's container may not be committed to this repository."""
        if not self.repositories:
            return
        allowed = tuple(name for prefix in self.repositories if (name := _for_owner(prefix, owner)))
        requested = familiar_repository(repository)
        if not any(requested == name or requested.startswith(f"{name}/") for name in allowed):
            raise ImageNameForbidden(repository=repository, allowed=allowed)


def _for_owner(prefix: str, owner: str) -> str:
    """A prefix with the owner inserted; empty if this owner cannot be part of an image name.

    An owner with a slash could name another owner's prefix; capitals are not allowed in image names.
    """
    if OWNER_PLACEHOLDER in prefix:
        if not owner or not _OWNER_IN_REPOSITORY.issuperset(owner):
            return ""
        prefix = prefix.replace(OWNER_PLACEHOLDER, owner)
    return familiar_repository(prefix)


@dataclass(frozen=True, slots=True)
class CommitName:
    """The name for a committed image. `replace`: the caller allows to replace an image of another owner."""

    reference: str
    owner: str
    replace: bool


@dataclass(frozen=True, slots=True)
class ImageChoice:
    """The image to use: `image_id`, or, if empty, one to pull. `present_id`: the image that has the name before."""

    image_id: str
    present_id: str = ""


@dataclass(frozen=True, slots=True)
class Pull:
    """An image to be pulled for an owner. `auth` None: no credentials, or a resumed pull, whose credentials are lost.

    `authenticated`: the caller gave credentials. `present_id`: the image that had the name before. It was not pulled
    with these credentials, so that a pull with unnecessary or wrong ones does not restrict it for other owners.
    `stall_seconds` None: the node's setting.
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
    """Chooses, checks and pulls images of a node's engine, and records their origins."""

    store: Store
    engine: Engine
    layers: LayerStore
    node: str
    policy: ImagePolicy

    async def find_replaceable(self, name: CommitName) -> str:
        """The id of the image that the commit may replace; empty if the name is free. Raises ImageExists."""
        reference = name.reference
        self.policy.names.require_not_pulled(reference)
        repository, _, tag = reference.rpartition(":")
        found = await self.engine.image(reference)
        if found is None:
            # Such a name would hide the image: `docker run 0a1b2c3d4e5f` prefers a name to an id.
            if tag == "latest" and await self.engine.image(repository) is not None:
                detail = "the repository equals the id of an image; choose another repository"
                raise ImageExists(image=repository, detail=detail)
            return ""
        origin = await self.store.image_origin(self.node, found.id)
        committed = origin is not None and origin.committed_as == familiar_reference(reference)
        if committed and origin is not None and origin.committed_for == name.owner:
            return found.id
        if name.replace and self.policy.replace_any:
            return found.id
        owner = f"for owner {name.owner!r}" if name.owner else "without an owner"
        rule = f"it was not committed {owner} under this name"
        solution = (
            "use another name; the setting commit_replace forbids `replace` on this node"
            if name.replace
            else "use another name, or set `replace` if the setting commit_replace allows it"
        )
        raise ImageExists(image=reference, detail=f"{rule}; {solution}")

    def committed_origin(self, image_id: str, name: CommitName) -> PutImageOrigin:
        """The change that records the origin of a committed image."""
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
        """Choose between the image that the engine has and a pull. Raises ImageNotFound."""
        found = await self.engine.image(reference)
        present = found.id if found else ""
        if policy is PullPolicy.ALWAYS:
            return ImageChoice("", present)
        if found is not None and await self.may_use(found.id, owner):
            return ImageChoice(found.id, present)
        if policy is PullPolicy.NEVER:
            # The same error if the image exists, so that callers cannot probe the images of other owners.
            raise ImageNotFound(image=reference)
        return ImageChoice("", present)

    async def require_user(self, image_id: str, reference: str, user: str) -> None:
        """Raise InvalidArgument if an image lacks the user or group that a spec names.

        Without a check, if the image is not pulled yet or its layers are not accessible to this daemon.
        """
        if not user or not image_id:
            return
        image = await self.engine.image(image_id)
        if image is not None:
            _require_account(await self.layers.accounts(image), user, f"image {reference!r}")

    async def require_user_in_files(self, container: Container, user: str) -> None:
        """Raise InvalidArgument if the current files of a container lack the user or group of a spec.

        Without a check, if the files are not accessible to this daemon.
        """
        if not user or container.engine is None:
            return
        engine_container = await self.engine.inspect(container.engine.engine_id)
        if engine_container is None or not engine_container.upper_dir:
            return
        image = await self.engine.image(engine_container.image_id)
        if image is not None:
            accounts = await self.layers.accounts(image, engine_container.upper_dir)
            _require_account(accounts, user, f"container {container.name!r}")

    async def may_use(self, image_id: str, owner: str) -> bool:
        """Whether an owner may use an image that the engine has, without proving access to the registry."""
        if not self.policy.verify_access:
            return True
        origin = await self.store.image_origin(self.node, image_id)
        return origin is None or not origin.restricted or owner in origin.owners

    def pull_step(self, pull: Pull) -> Step:
        """The step that pulls an image. The image stays when the step is undone."""
        return Step(
            PULLED.step,
            lambda run: self.pull(run, pull),
            lambda _run: self._restrict_after_failed_pull(pull),
            interruptible=True,
        )

    async def pull(self, run: OperationRun, pull: Pull) -> PulledImage:
        """Pull an image, and record that its owner has access to it. Raises ImagePullFailed, ImageNotFound."""
        async with self.policy.names.pull_lock(pull.reference):
            await self._pull_with_stall_timeout(run, pull)
            image = await self.engine.image(pull.reference)
        if image is None:
            raise ImageNotFound(image=pull.reference)
        await self._record_pull(image.id, (pull.owner,), restricted=pull.authenticated and image.id != pull.present_id)
        return PulledImage(image_id=image.id)

    async def _pull_with_stall_timeout(self, run: OperationRun, pull: Pull) -> None:
        seconds = pull.stall_seconds or self.policy.pull_stall_seconds
        monitor = _StallMonitor(run, seconds)
        stall_task = asyncio.create_task(monitor.describe_stalls())
        try:
            async with monitor.stall_timeout:
                await self.engine.pull(pull.reference, pull.auth, monitor.on_progress)
        except TimeoutError:
            if not monitor.stall_timeout.expired():
                raise
            detail = f"no progress for {seconds:g} s (last at {monitor.last_time})"
            raise ImagePullFailed(image=pull.reference, detail=detail) from None
        finally:
            stall_task.cancel()

    async def _restrict_after_failed_pull(self, pull: Pull) -> None:
        """Undo a pull with credentials: the image stays, but each owner must pull it again before using it.

        A daemon that was killed may have pulled an image without recording it, and a resumed pull has no credentials.
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
        """Delete the records of images that the engine no longer has."""
        # The records are listed first: an image that is recorded later must not be taken for a removed one.
        recorded = [origin.image_id for origin in await self.store.image_origins(self.node)]
        if not recorded:
            return
        present = frozenset(await self.engine.image_ids())
        for image_id in recorded:
            if image_id not in present:
                await self.store.apply([DeleteImageOrigin(self.node, image_id)])


def _require_account(accounts: ImageAccounts | None, user: str, subject: str) -> None:
    if accounts is not None and (missing := accounts.missing(user)):
        description = f"{subject} has no {missing}; use a name of its /etc/passwd and /etc/group, or a number"
        raise InvalidArgument(violations=(FieldViolation(field="spec.user", description=description),))


class _StallMonitor:
    """Tracks the progress of a pull: reports a stall in its stage, and cancels it after `seconds` without progress."""

    def __init__(self, run: OperationRun, seconds: float) -> None:
        self._run = run
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self.stall_timeout = asyncio.timeout(seconds)
        self.last_time = _time_text()

    def on_progress(self, current_bytes: int, total_bytes: int) -> None:
        """Record progress of the pull."""
        self._last, self.last_time = self._loop.time(), _time_text()
        self.stall_timeout.reschedule(self._last + self._seconds)
        self._run.set_stage_message("")
        self._run.progress(current_bytes, total_bytes)

    async def describe_stalls(self) -> None:
        """Report stalls in the operation's stage until cancelled."""
        notice_seconds = min(_STALL_NOTICE_SECONDS, self._seconds / 2)
        while True:
            remaining = self._last + notice_seconds - self._loop.time()
            if remaining <= 0:
                self._run.set_stage_message(
                    f"pull stalled since {self.last_time}; it fails after {self._seconds:g} s without progress"
                )
            await asyncio.sleep(max(remaining, _STALL_NOTICE_SECONDS / 10))


def _time_text() -> str:
    return now().isoformat(timespec="seconds")
