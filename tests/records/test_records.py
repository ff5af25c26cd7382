"""Every record of every recording is read, and written again without a loss. These tests need no engine and no etcd."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gpudock_server
import pytest
from gpudock_server.adapters.etcd.keys import KeyRange, Keys, WatchKeys
from gpudock_server.adapters.etcd.operation_parts import OperationArguments, OperationResult
from gpudock_server.adapters.etcd.values import decode, decode_snapshot, encode
from gpudock_server.adapters.layers import FolderRevisionBackupStore
from gpudock_server.adapters.layers.snapshot_folders import SnapshotFolders
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.core.containers.change_plan import ChangePlan
from gpudock_server.core.containers.change_saga import LayerTransfer
from gpudock_server.core.containers.clone import CloneArguments
from gpudock_server.core.containers.commit import CommitArguments, CommittedFiles, FileHolder, StrippedImage
from gpudock_server.core.containers.create import CreateArguments
from gpudock_server.core.containers.delete import DeleteArguments
from gpudock_server.core.containers.engine_containers import CreatedEngineContainer
from gpudock_server.core.containers.history import DeleteRevisionArguments
from gpudock_server.core.containers.layer_images import LayerImage
from gpudock_server.core.containers.new_container import WatchedStart
from gpudock_server.core.containers.pause import PauseArguments
from gpudock_server.core.containers.stop import StopArguments
from gpudock_server.core.volumes.adopt import AdoptArguments
from gpudock_server.core.volumes.create import CreateArguments as CreateVolumeArguments
from gpudock_server.core.volumes.create import CreatedEngineVolume
from gpudock_server.core.volumes.delete import DeleteArguments as DeleteVolumeArguments
from gpudock_server.core.volumes.resize import LocatedContent, ResizeArguments
from gpudock_server.model.claims import Holder, PortKey
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import Operation, OperationKind, RequestRecord
from gpudock_server.model.record import Record
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.snapshot import Snapshot, SnapshotKey
from gpudock_server.model.spec import Protocol
from gpudock_server.model.volume import TreeSummary, Volume, VolumeBacking, VolumeRevision
from gpudock_server.ports import LayerPair

from tests.records.recording import Recording, recordings, require_contains
from tests.records.test_changes import FLAGS

# The record type of a value, by the beginning of its key.
_RECORDS: dict[str, type[Record]] = {
    "nodes": NodeRecord,
    "hosts": Holder,
    "containers": Container,
    "revisions/containers": ContainerRevision,
    "revisions/volumes": VolumeRevision,
    "volumes": Volume,
    "operations": Operation,
    "arguments": OperationArguments,
    "results": OperationResult,
    "requests": RequestRecord,
    "images": ImageOrigin,
}
_SNAPSHOTS = "snapshots/containers"
# Keys whose values have no record.
_WITHOUT_RECORD = {"schema", "locks/containers", "locks/volumes", "idle/containers", "idle/volumes"}
# Only an embedded etcd has this key, without a value; the etcd of the tests does not have it.
_NOT_RECORDED = {"idle/keeper"}
_ARGUMENTS: dict[OperationKind, type[Record]] = {
    OperationKind.CREATE: CreateArguments,
    OperationKind.START: ChangePlan,
    OperationKind.STOP: StopArguments,
    OperationKind.RESTART: ChangePlan,
    OperationKind.PAUSE: PauseArguments,
    OperationKind.UNPAUSE: PauseArguments,
    OperationKind.DELETE: DeleteArguments,
    OperationKind.SCALE: ChangePlan,
    OperationKind.UPDATE: ChangePlan,
    OperationKind.ROLLBACK: ChangePlan,
    OperationKind.DELETE_REVISION: DeleteRevisionArguments,
    OperationKind.COMMIT: CommitArguments,
    OperationKind.CLONE: CloneArguments,
    OperationKind.CREATE_VOLUME: CreateVolumeArguments,
    OperationKind.RESIZE_VOLUME: ResizeArguments,
    OperationKind.DELETE_VOLUME: DeleteVolumeArguments,
    OperationKind.ADOPT_VOLUME: AdoptArguments,
}
# The result types of steps, by the kind of the operation's resource.
_STEP_RESULTS: dict[tuple[ResourceKind, str], type[Record]] = {
    (ResourceKind.CONTAINER, "create"): CreatedEngineContainer,
    (ResourceKind.CONTAINER, "locate"): LayerPair,
    (ResourceKind.CONTAINER, "carry"): LayerTransfer,
    (ResourceKind.CONTAINER, "snapshot"): LayerImage,
    (ResourceKind.CONTAINER, "seal"): Snapshot,
    (ResourceKind.CONTAINER, "verify"): WatchedStart,
    (ResourceKind.CONTAINER, "copy-files"): FileHolder,
    (ResourceKind.CONTAINER, "commit-files"): CommittedFiles,
    (ResourceKind.CONTAINER, "image"): StrippedImage,
    (ResourceKind.VOLUME, "store"): VolumeBacking,
    (ResourceKind.VOLUME, "engine-volume"): CreatedEngineVolume,
    (ResourceKind.VOLUME, "make"): VolumeBacking,
    (ResourceKind.VOLUME, "locate"): LocatedContent,
    (ResourceKind.VOLUME, "difference"): TreeSummary,
}
# Result types that the newest recording does not have: of a pull, of a graft, and of files that were not kept.
_RESULTS_NOT_RECORDED = {"PulledImage", "GraftedImage", "MissedSnapshot"}
# Record types that are not stored: base classes, plans, drift, and what the engine, the driver and the disk show.
_NEVER_STORED = {
    "CommitCost",
    "Drift",
    "DriftReport",
    "EngineImage",
    "EngineInfo",
    "EngineVolume",
    "Gpu",
    "GpuProcess",
    "GpuReport",
    "HistoryLimits",
    "HostCapacity",
    "ImageAccounts",
    "NewContainerArguments",
    "PoolUsage",
    "SnapshotPlan",
    "BackingOnDisk",
    "VolumeUsage",
    "_CopyPlan",
}
# The methods of Keys that make a key or a key range, with example arguments.
_UUID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
_MADE: dict[str, tuple[Any, ...]] = {
    "schema": (),
    "node": ("n",),
    "nodes": (),
    "claim": ("h", PortKey(Protocol.TCP, 80)),
    "claims": ("h",),
    "container": ("c",),
    "containers": (),
    "lock": (ResourceKind.VOLUME, "v"),
    "locks": (ResourceKind.CONTAINER,),
    "all_locks": (),
    "watched": (ResourceKind.VOLUME, KeyRange(b"", b"")),
    "container_revision": (_UUID, 1),
    "container_revisions": (_UUID,),
    "container_snapshot": (_UUID, 1),
    "container_snapshots": (_UUID,),
    "volume": ("v",),
    "volumes": (),
    "volume_revision": (_UUID, 1),
    "volume_revisions": (_UUID,),
    "operation": (_UUID,),
    "operations": (),
    "arguments": (_UUID,),
    "result": (_UUID, 1),
    "results_of": (_UUID,),
    "results": (),
    "maintenance_marker": (),
    "request": (_UUID,),
    "image_origin": ("n", "i"),
    "image_origins": ("n",),
}
_KEY_PARSERS = {"claim_of", "last_segment", "lock_of"}


@pytest.fixture(params=recordings(), ids=lambda folder: folder.name)
def recording(request: pytest.FixtureRequest) -> Recording:
    """Each recording."""
    return Recording.read(request.param)


def test_there_is_a_recording() -> None:
    assert recordings()


def test_every_record_is_read_and_written_again_without_a_loss(recording: Recording) -> None:
    for key, stored in recording.keys.items():
        if (record := _decoded(key, stored.value)) is None:
            continue
        again = encode(record)
        assert _decoded(key, again) == record, key
        require_contains(json.loads(again)["record"], json.loads(stored.value)["record"], key)


def test_arguments_and_results_of_steps_are_read(recording: Recording) -> None:
    unfinished: set[OperationKind] = set()
    facts: set[tuple[ResourceKind, str]] = set()
    for operation, arguments in _operations(recording):
        for stage in operation.stages:
            if stage.facts:
                step = (operation.target.kind, stage.name)
                facts.add(step)
                require_contains(
                    _STEP_RESULTS[step].model_validate(stage.facts).model_dump(mode="json"), stage.facts, operation.id
                )
        if arguments is None:
            assert operation.state.ended
            continue
        unfinished.add(operation.kind)
        kept = _arguments(recording, operation)
        if isinstance(arguments, ChangePlan):
            # Read as the method of the change, and tested, by test_changes.
            kept = {name: value for name, value in kept.items() if name not in (*FLAGS, "carry")}
        require_contains(arguments.model_dump(mode="json"), kept, operation.id)
    assert {_ARGUMENTS[kind] for kind in unfinished} == set(_ARGUMENTS.values())
    assert facts == _STEP_RESULTS.keys()


async def test_files_next_to_the_store_are_read(recording: Recording, tmp_path: Path) -> None:
    assert [record for record in await _on_disk(recording, tmp_path) if record is None] == []


def test_every_kind_of_key_is_in_the_newest_recording() -> None:
    declared = {name for name in vars(Keys) if not name.startswith("_")}
    assert declared == _MADE.keys() | _KEY_PARSERS
    made: set[str] = set()
    for name, arguments in _MADE.items():
        match vars(Keys)[name](Keys("/p/"), *arguments):
            case bytes(key):
                made.add(_kind(_without_prefix(key)))
            case KeyRange(start):
                made.add(_kind(_without_prefix(start)))
            case WatchKeys(idle=key):
                made.add(_kind(_without_prefix(key)))
    known = _RECORDS.keys() | _WITHOUT_RECORD | _NOT_RECORDED | {_SNAPSHOTS}
    assert {key_kind for key_kind in made if not _is_known(key_kind, known)} == set()
    newest = Recording.read(recordings()[-1])
    assert {_kind(key) for key in newest.keys} == known - _NOT_RECORDED


async def test_every_type_of_record_is_in_the_newest_recording(tmp_path: Path) -> None:
    for module in pkgutil.walk_packages(gpudock_server.__path__, f"{gpudock_server.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    newest = Recording.read(recordings()[-1])
    recorded: set[type[Record]] = set()
    for key, stored in newest.keys.items():
        recorded |= set(_types_in(_decoded(key, stored.value)))
    for operation, arguments in _operations(newest):
        recorded |= set(_types_in(arguments))
        for stage in operation.stages:
            recorded |= {_STEP_RESULTS[operation.target.kind, stage.name]} if stage.facts else set()
    for record in await _on_disk(newest, tmp_path):
        recorded |= set(_types_in(record))
    package = __package__ or "tests"
    declared = {kind for kind in _subclasses(Record) if not kind.__module__.startswith(package)}
    assert {record_type.__name__ for record_type in declared - recorded} == _NEVER_STORED | _RESULTS_NOT_RECORDED


# -- reading -----------------------------------------------------------------------------------------------------------


def _kind(key: str) -> str:
    """The beginning of a key, which identifies the type of its value."""
    first, _, rest = key.partition("/")
    return f"{first}/{rest.partition('/')[0]}" if first in ("revisions", "snapshots", "locks", "idle") else first


def _is_known(kind: str, known: set[str]) -> bool:
    """Whether `known` has this kind; a range may span several kinds."""
    return kind in known or (kind.endswith("/") and any(other.startswith(kind) for other in known))


def _without_prefix(key: bytes) -> str:
    return key.decode().removeprefix("/p/")


def _decoded(key: str, value: bytes) -> Record | None:
    """The record of a key; None if its value has no record. Raises RecordUnreadable."""
    kind = _kind(key)
    if kind in _WITHOUT_RECORD:
        return None
    if kind == _SNAPSHOTS:
        return decode_snapshot(key.encode(), value)
    return decode(_RECORDS[kind], key.encode(), value)


def _operations(recording: Recording) -> Iterator[tuple[Operation, Record | None]]:
    """Every operation, with its arguments if it has not ended."""
    for key, stored in recording.keys.items():
        if _kind(key) == "operations":
            operation = decode(Operation, key.encode(), stored.value)
            kept = _arguments(recording, operation)
            yield operation, None if kept is None else _ARGUMENTS[operation.kind].model_validate(kept)


def _arguments(recording: Recording, operation: Operation) -> Any:
    """The recorded arguments of an operation; None if there are none."""
    stored = recording.keys.get(f"arguments/{operation.id}")
    return None if stored is None else json.loads(stored.value)["record"]["arguments"]


async def _on_disk(recording: Recording, folder: Path) -> list[Record | None]:
    """The records in the files, read as the daemon reads them; None for a file that it cannot read."""
    read: list[Record | None] = []
    for path in _written(recording, folder):
        if path.name == "volume.json":
            backing, identity = BackingFolder(path.parents[1], path.parent.name).recorded() or (None, None)
            # The backing that a resize makes belongs to no volume yet.
            read += [backing] if identity is None else [backing, identity]
        elif path.name == "meta.json":
            key = SnapshotKey(uid=path.parents[1].name, revision=int(path.parent.name))
            read.append(SnapshotFolders(str(path.parents[2])).meta(key))
        else:
            entries = await FolderRevisionBackupStore(path.parents[1]).read(path.parent.name)
            read.append(next((entry for entry in entries if f"{entry.number}.json" == path.name), None))
    assert len(recording.disk) <= len(read)
    return read


def _written(recording: Recording, folder: Path) -> list[Path]:
    """Write all files with records below a folder; returns their paths."""
    for name, text in recording.disk.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return sorted(folder / name for name in recording.disk)


def _types_in(value: object) -> Iterator[type[Record]]:
    match value:
        case Record():
            yield type(value)
            for name in type(value).model_fields:
                yield from _types_in(vars(value)[name])
        case tuple() | list():
            for record in value:
                yield from _types_in(record)
        case Mapping():
            for record in value.values():
                yield from _types_in(record)


def _subclasses(kind: type[Record]) -> Iterator[type[Record]]:
    for record_type in kind.__subclasses__():
        yield record_type
        yield from _subclasses(record_type)
