"""Watches of a real daemon, and what they are told of: heads in its store, written as another node's daemon would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import grpc
from aetcd import rpc
from gpudock.v1 import container_pb2, container_service_pb2, volume_pb2, volume_service_pb2
from gpudock_server.adapters.etcd import EtcdConnection, EtcdStore, messages
from gpudock_server.model.store_changes import DeleteContainer, DeleteVolume, PutContainer, PutVolume

from tests.calls import Caller, Failure, failure_of
from tests.engine.etcd_examples import container, open_connection, volume
from tests.rig.patience import limit

SOON = 20.0
OFTEN = ("--watch-checkpoint-interval", "0.5")

T = TypeVar("T", container_pb2.Container, volume_pb2.Volume)


class AnyWatcher(Generic[T]):
    """One call of a watch."""

    def __init__(self, call: Any, token: str) -> None:
        self.call = call
        self.token = token

    async def event(self) -> tuple[str, Any]:
        """What the next message says: its kind and what it holds."""
        async with asyncio.timeout(limit(SOON)):
            response = await self.call.read()
        assert response is not grpc.aio.EOF, "a watch has no end"  # type: ignore[attr-defined]  # missing in its stubs
        assert response.resume_token
        self.token = response.resume_token
        kind = response.WhichOneof("event")
        return kind, getattr(response, kind)

    async def change(self) -> tuple[str, T]:
        """The next that is no checkpoint."""
        while (event := await self.event())[0] == "checkpoint":
            pass
        return event

    async def listed(self) -> list[str]:
        """The names of those that were there, up to the checkpoint that ends them."""
        names = []
        while (event := await self.event())[0] == "added":
            names.append(event[1].name)
        assert event[0] == "checkpoint"
        assert event[1].list_complete
        return names

    async def changes(self, count: int) -> list[tuple[str, str]]:
        """The next ones: kind, and name with revision, which the tests' own heads are told apart by."""
        found = [await self.change() for _ in range(count)]
        return [(kind, f"{item.name}.{item.revision}") for kind, item in found]

    async def failure(self) -> Failure:
        """The error that it ends with."""
        try:
            while True:
                await self.event()
        except grpc.aio.AioRpcError as error:
            return failure_of(error)


class Watcher(AnyWatcher[container_pb2.Container]):
    """One call of WatchContainers."""

    def __init__(self, caller: Caller, token: str = "", **asked: Any) -> None:
        filters = container_service_pb2.ContainerFilter(**asked)
        request = container_service_pb2.WatchContainersRequest(filter=filters, resume_token=token)
        super().__init__(caller.containers.WatchContainers(request), token)


class VolumeWatcher(AnyWatcher[volume_pb2.Volume]):
    """One call of WatchVolumes."""

    def __init__(self, caller: Caller, token: str = "", **asked: Any) -> None:
        filters = volume_service_pb2.VolumeFilter(**asked)
        request = volume_service_pb2.WatchVolumesRequest(filter=filters, resume_token=token)
        super().__init__(caller.volumes.WatchVolumes(request), token)

    async def mounted(self, count: int) -> list[str]:
        """The next changes: kind, name with revision, and who mounts it."""
        found = [await self.change() for _ in range(count)]
        return [" ".join((kind, f"{item.name}.{item.revision}", *item.attached_containers)) for kind, item in found]


class Writer:
    """Writes heads into a daemon's store, as a daemon of another node would."""

    def __init__(self, connection: EtcdConnection, prefix: str) -> None:
        self.connection = connection
        self.store = EtcdStore(connection, prefix=prefix)
        self.versions: dict[str, int] = {}

    async def put(self, name: str, revision: int, **fields: Any) -> None:
        """Write a head."""
        head = container(name, revision=revision, node="elsewhere", **fields)
        change = PutContainer(head, expect=self.versions.get(name, 0))
        self.versions[name] = await self.store.apply([change])

    async def delete(self, name: str) -> None:
        """Delete it."""
        await self.store.apply([DeleteContainer(name, f"uid-{name}", self.versions.pop(name))])

    async def put_volume(self, name: str, revision: int) -> None:
        """Write the head of a volume."""
        head = volume(name, revision=revision, node="elsewhere")
        change = PutVolume(head, expect=self.versions.get(f"volume {name}", 0))
        self.versions[f"volume {name}"] = await self.store.apply([change])

    async def delete_volume(self, name: str) -> None:
        """Delete it."""
        await self.store.apply([DeleteVolume(name, f"uid-{name}", self.versions.pop(f"volume {name}"))])

    async def compact(self) -> None:
        """Have etcd forget everything but what is there now."""
        revision = (await self.connection.txn(success=[messages.get(b"nothing")])).revision
        request = rpc.CompactionRequest(revision=revision, physical=True)
        await self.connection._client.kvstub.Compact(request, timeout=5)


@asynccontextmanager
async def writing(endpoint: str, prefix: str) -> AsyncIterator[Writer]:
    async with open_connection(endpoint) as connection:
        yield Writer(connection, prefix)
