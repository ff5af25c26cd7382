"""Containers: create, read, watch, change, delete, and run commands in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack, cast

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from gpudock._calls import Calls, request_id_or_new
from gpudock._enums import enum_value
from gpudock._exec import Completed, ExecOptions, ExecSession, collect, exec_method, exec_start
from gpudock._operations import OperationCall, Operations
from gpudock._pages import Pages
from gpudock._spec import ChangeOptions, Gpus, Seconds, SpecOptions, duration, gpu_request, spec_of, split_options
from gpudock._watch import Watch
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1.committed_image_pb2 import CommittedImage
from gpudock.v1.container_pb2 import Container, ContainerSpec, ContainerState, SnapshotPolicy
from gpudock.v1.container_revision_pb2 import ContainerRevision
from gpudock.v1.container_service_pb2_grpc import ContainerServiceStub
from gpudock.v1.operation_service_pb2 import OperationResult
from gpudock.v1.registry_auth_pb2 import RegistryAuth

_OUTPUT_LIMIT = 16 * 1024 * 1024


class Containers:
    """The containers of the installation.

    Arguments that several methods share:

    - `request_id`: a UUID that identifies a change, which is made once, however often it is called under that id. By
      default each call has a new id and keeps it for its retries.
    - `etag`: the change fails with Aborted (STALE_ETAG) if the container changed since it was read with this etag.
    - `snapshots`: whether to keep the files of the revision that the change replaces: `always`, `cheap` (only where
      nothing is copied) or `never`; by default the policy of the container, else of the node, applies.
    - `validate_only`: change nothing; await `plan()` of the returned call.
    """

    def __init__(self, calls: Calls, channel: grpc.aio.Channel, operations: Operations) -> None:
        self._calls = calls
        self._stub = ContainerServiceStub(channel)
        self._exec = exec_method(channel)
        self._operations = operations

    def create(
        self,
        name: str,
        image: str | ContainerSpec,
        *,
        owner: str = "",
        pull: str = "missing",
        create_only: bool = False,
        validate_only: bool = False,
        registry_auth: RegistryAuth | None = None,
        pull_stall_timeout: Seconds | None = None,
        request_id: str | None = None,
        **options: Unpack[SpecOptions],
    ) -> OperationCall[Container]:
        """Create a container from an image or a whole spec, changed by `options`; start it unless `create_only`.

        `pull` is `missing`, `always` or `never`. A pull fails after `pull_stall_timeout` seconds without progress
        (None: the setting of the node). A creation that fails or is cancelled leaves nothing.
        """
        request = pb.CreateContainerRequest(
            name=name,
            owner=owner,
            spec=spec_of(image, options),
            pull_policy=enum_value(pb.PullPolicy, pull),
            create_only=create_only,
            request_id=request_id_or_new(request_id),
            validate_only=validate_only,
            registry_auth=registry_auth,
            pull_stall_timeout=None if pull_stall_timeout is None else duration(pull_stall_timeout),
        )
        return self._operations.begin(self._stub.CreateContainer, request, _container_of)

    async def get(self, name: str) -> Container:
        """Return a container."""
        return (await self._calls.read(self._stub.GetContainer, pb.GetContainerRequest(name=name))).container

    def list(
        self,
        *,
        states: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        owner: str = "",
        node: str = "",
        page_size: int = 0,
    ) -> Pages[Container]:
        """List containers by name: in any of `states` (such as `running`), with all `labels` (`""` is any value)."""
        filters = _filter(states, labels, owner, node)
        request = pb.ListContainersRequest(page_size=page_size, filter=filters)
        return Pages(self._calls, self._stub.ListContainers, request, lambda answer: answer.containers)

    def watch(
        self,
        *,
        states: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        owner: str = "",
        node: str = "",
        resume_token: str = "",
        changes_only: bool = False,
        checkpoints: bool = False,
    ) -> Watch[Container]:
        """Watch containers: first one `added` event for each, unless `changes_only`, then one event for each change.

        The filter is that of `list`. With the `resume_token` of an event and the same filter, the watch continues after
        that event.
        """
        filters = _filter(states, labels, owner, node)
        request = pb.WatchContainersRequest(filter=filters, resume_token=resume_token, changes_only=changes_only)
        return Watch(self._calls, self._stub.WatchContainers, request, checkpoints=checkpoints)

    def start(
        self,
        name: str,
        *,
        gpus: Gpus | None = None,
        snapshots: str | None = None,
        validate_only: bool = False,
        etag: str = "",
        request_id: str | None = None,
    ) -> OperationCall[Container]:
        """Start a stopped container; `gpus` replaces the GPUs of its spec."""
        request = pb.StartContainerRequest(
            name=name,
            gpus=None if gpus is None else gpu_request(gpus),
            request_id=request_id_or_new(request_id),
            etag=etag,
            snapshots=_snapshots(snapshots),
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.StartContainer, request, _container_of)

    async def stop(
        self,
        name: str,
        *,
        keep_resources: bool = False,
        timeout: Seconds | None = None,
        etag: str = "",
        request_id: str | None = None,
    ) -> Container:
        """Stop a container, with SIGKILL after `timeout`, and release its GPUs and ports unless `keep_resources`."""
        request = pb.StopContainerRequest(
            name=name,
            keep_resources=keep_resources,
            timeout=None if timeout is None else duration(timeout),
            request_id=request_id_or_new(request_id),
            etag=etag,
        )
        return (await self._calls.change(self._stub.StopContainer, request)).container

    def restart(
        self,
        name: str,
        *,
        timeout: Seconds | None = None,
        snapshots: str | None = None,
        validate_only: bool = False,
        etag: str = "",
        request_id: str | None = None,
    ) -> OperationCall[Container]:
        """Stop a container, with SIGKILL after `timeout`, and start it with the same GPUs and ports."""
        request = pb.RestartContainerRequest(
            name=name,
            timeout=None if timeout is None else duration(timeout),
            request_id=request_id_or_new(request_id),
            etag=etag,
            snapshots=_snapshots(snapshots),
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.RestartContainer, request, _container_of)

    async def pause(self, name: str, *, etag: str = "", request_id: str | None = None) -> Container:
        """Pause all processes of a container; it keeps its GPUs and ports."""
        request = pb.PauseContainerRequest(name=name, request_id=request_id_or_new(request_id), etag=etag)
        return (await self._calls.change(self._stub.PauseContainer, request)).container

    async def unpause(self, name: str, *, etag: str = "", request_id: str | None = None) -> Container:
        """Unpause all processes of a container."""
        request = pb.UnpauseContainerRequest(name=name, request_id=request_id_or_new(request_id), etag=etag)
        return (await self._calls.change(self._stub.UnpauseContainer, request)).container

    async def delete(self, name: str, *, force: bool = False, etag: str = "", request_id: str | None = None) -> None:
        """Delete a container, its files and its claims; with `force` even if it is running."""
        request = pb.DeleteContainerRequest(name=name, force=force, request_id=request_id_or_new(request_id), etag=etag)
        await self._calls.change(self._stub.DeleteContainer, request)

    def scale(
        self,
        name: str,
        *,
        gpus: Gpus | None = None,
        cpus: float | None = None,
        memory_bytes: int | None = None,
        shm_size_bytes: int | None = None,
        strategy: str = "auto",
        snapshots: str | None = None,
        validate_only: bool = False,
        etag: str = "",
        request_id: str | None = None,
    ) -> OperationCall[Container]:
        """Set the GPUs, CPUs, memory or /dev/shm of a container to absolute values; None leaves a value unchanged.

        `strategy` is `auto`, `live` (in place or fail) or `recreate`. After a failure or a cancellation, the container
        runs as before.
        """
        request = pb.ScaleContainerRequest(
            name=name,
            gpus=None if gpus is None else gpu_request(gpus),
            cpus=cpus,
            memory_bytes=memory_bytes,
            shm_size_bytes=shm_size_bytes,
            strategy=enum_value(pb.ScaleStrategy, strategy),
            request_id=request_id_or_new(request_id),
            etag=etag,
            snapshots=_snapshots(snapshots),
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.ScaleContainer, request, _container_of)

    def update(
        self,
        name: str,
        *,
        image: str | None = None,
        files: str | None = None,
        pull: str = "missing",
        registry_auth: RegistryAuth | None = None,
        pull_stall_timeout: Seconds | None = None,
        snapshots: str | None = None,
        validate_only: bool = False,
        etag: str = "",
        request_id: str | None = None,
        update_mask: Iterable[str] | None = None,
        **options: Unpack[ChangeOptions],
    ) -> OperationCall[Container]:
        """Replace the image and the given options of a container; the other fields of its spec are unchanged.

        An empty value or None clears a field. `set_env`, `remove_env` and the other edits change single entries, and so
        does an `update_mask` that names parts of the options, such as `gpus.count`. `files` is `carry-commit` or
        `discard` and decides about the files of the container when the image changes. After a failure or a
        cancellation, the container is as before.
        """
        whole, edits = split_options(options)
        paths = [*whole] if image is None else ["image", *whole]
        request = pb.UpdateContainerRequest(
            name=name,
            spec=spec_of(image or "", whole),
            update_mask=FieldMask(paths=paths if update_mask is None else update_mask),
            edits=edits,
            files=pb.FILES_POLICY_UNSPECIFIED if files is None else enum_value(pb.FilesPolicy, files),
            pull_policy=enum_value(pb.PullPolicy, pull),
            registry_auth=registry_auth,
            pull_stall_timeout=None if pull_stall_timeout is None else duration(pull_stall_timeout),
            snapshots=_snapshots(snapshots),
            request_id=request_id_or_new(request_id),
            etag=etag,
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.UpdateContainer, request, _container_of)

    def rollback(
        self,
        name: str,
        revision: int,
        *,
        spec_only: bool = False,
        snapshots: str | None = None,
        validate_only: bool = False,
        etag: str = "",
        request_id: str | None = None,
    ) -> OperationCall[Container]:
        """Restore the spec and, unless `spec_only`, the files of a revision; this creates a new revision."""
        request = pb.RollbackContainerRequest(
            name=name,
            revision=revision,
            spec_only=spec_only,
            snapshots=_snapshots(snapshots),
            request_id=request_id_or_new(request_id),
            etag=etag,
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.RollbackContainer, request, _container_of)

    def clone(
        self,
        source: str,
        name: str,
        *,
        revision: int = 0,
        owner: str = "",
        create_only: bool = False,
        validate_only: bool = False,
        request_id: str | None = None,
        update_mask: Iterable[str] | None = None,
        **options: Unpack[ChangeOptions],
    ) -> OperationCall[Container]:
        """Create the container `name` from a revision of `source` (0: its current state) with a copy of the files.

        `options` and `update_mask` change the spec of the revision as in `update`. A clone that fails or is cancelled
        leaves nothing and does not change the source.
        """
        whole, edits = split_options(options)
        request = pb.CloneContainerRequest(
            name=name,
            source=source,
            revision=revision,
            spec=spec_of("", whole),
            update_mask=FieldMask(paths=[*whole] if update_mask is None else update_mask),
            edits=edits,
            owner=owner,
            create_only=create_only,
            request_id=request_id_or_new(request_id),
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.CloneContainer, request, _container_of)

    async def revision(self, name: str, revision: int = 0) -> ContainerRevision:
        """Return a revision of a container; 0 means the current one."""
        request = pb.GetContainerRevisionRequest(name=name, revision=revision)
        return (await self._calls.read(self._stub.GetContainerRevision, request)).revision

    def revisions(self, name: str, *, page_size: int = 0) -> Pages[ContainerRevision]:
        """List the revisions of a container, oldest first."""
        request = pb.ListContainerRevisionsRequest(name=name, page_size=page_size)
        return Pages(self._calls, self._stub.ListContainerRevisions, request, lambda answer: answer.revisions)

    async def delete_revision(self, name: str, revision: int, *, etag: str = "", request_id: str | None = None) -> None:
        """Delete a revision and its files."""
        request = pb.DeleteContainerRevisionRequest(
            name=name, revision=revision, request_id=request_id_or_new(request_id), etag=etag
        )
        await self._calls.change(self._stub.DeleteContainerRevision, request)

    def commit(
        self,
        name: str,
        repository: str,
        *,
        tag: str = "",
        author: str = "",
        comment: str = "",
        changes: Sequence[str] = (),
        pause: bool = True,
        replace: bool = False,
        validate_only: bool = False,
        etag: str = "",
        request_id: str | None = None,
    ) -> OperationCall[CommittedImage]:
        """Create the image `repository:tag` (tag: `latest`) from the files of a container.

        A running container is paused meanwhile, unless `pause` is False. `changes` are Dockerfile instructions such as
        `CMD ["serve"]`. An existing image of that name is replaced if gpudock committed it for the same owner; any
        other image only with `replace`, if the node allows it, else the call fails with IMAGE_EXISTS.
        """
        request = pb.CommitContainerRequest(
            name=name,
            repository=repository,
            tag=tag,
            author=author,
            comment=comment,
            changes=changes,
            pause=pause,
            replace=replace,
            request_id=request_id_or_new(request_id),
            etag=etag,
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.CommitContainer, request, _image_of)

    def exec(self, name: str, command: Sequence[str], **options: Unpack[ExecOptions]) -> ExecSession:
        """Run a command in a running container: `async with client.containers.exec("web", ["top"]) as session`."""
        return ExecSession(lambda: self._calls.bidi_stream(self._exec), exec_start(name, command, options))

    async def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        input: bytes | None = None,  # noqa: A002 - as in subprocess.run
        limit_bytes: int = _OUTPUT_LIMIT,
        **options: Unpack[ExecOptions],
    ) -> Completed:
        """Run a command until it exits, with `input` as its stdin, and return its output and its exit.

        The first `limit_bytes` of stdout and of stderr are kept; the rest is discarded.
        """
        options["stdin"] = input is not None
        return await collect(self.exec(name, command, **options), input, limit_bytes)


def _filter(states: Iterable[str], labels: Mapping[str, str] | None, owner: str, node: str) -> pb.ContainerFilter:
    return pb.ContainerFilter(
        states=[enum_value(ContainerState, state) for state in states], labels=labels or {}, owner=owner, node=node
    )


def _container_of(result: Any) -> Container:  # noqa: ANN401 - the result's type is that of the RPC's own message
    """Return the container of a result, which is that of the operation's own RPC or of WatchOperation."""
    return result.container if isinstance(result, OperationResult) else cast("Container", result)


def _image_of(result: Any) -> CommittedImage:  # noqa: ANN401 - the result's type is that of the RPC's own message
    """Return the image of a result, which is that of CommitContainer or of WatchOperation."""
    return result.image if isinstance(result, OperationResult) else cast("CommittedImage", result)


def _snapshots(word: str | None) -> SnapshotPolicy.ValueType:
    return SnapshotPolicy.SNAPSHOT_POLICY_UNSPECIFIED if word is None else enum_value(SnapshotPolicy, word)
