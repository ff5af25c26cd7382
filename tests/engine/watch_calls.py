"""Calls of watches, and a writer that stores records as the daemon of another node does."""

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

EVENT_SECONDS = 20.0
FREQUENT_CHECKPOINTS = ("--watch-checkpoint-interval", "0.5")

T = TypeVar("T", container_pb2.Container, volume_pb2.Volume)


class WatchCall(Generic[T]):
    """One call of a watch; `token` is the resume token of the last event."""

    def __init__(self, call: Any, token: str) -> None:
        self.call = call
        self.token = token

    async def event(self) -> tuple[str, Any]:
        """The next event: its kind and its value; raises the error of the call."""
        async with asyncio.timeout(limit(EVENT_SECONDS)):
            response = await self.call.read()
        assert response is not grpc.aio.EOF, "the watch ended without an error"  # type: ignore[attr-defined]  # missing in its stubs
        assert response.resume_token
        self.token = response.resume_token
        kind = response.WhichOneof("event")
        return kind, getattr(response, kind)

    async def change(self) -> tuple[str, T]:
        """The next event that is no checkpoint."""
        while (event := await self.event())[0] == "checkpoint":
            pass
        return event

    async def initial_names(self) -> list[str]:
        """The names in the initial list, up to the checkpoint that ends it."""
        names = []
        while (event := await self.event())[0] == "added":
            names.append(event[1].name)
        assert event[0] == "checkpoint"
        assert event[1].list_complete
        return names

    async def changes(self, count: int) -> list[tuple[str, str]]:
        """The next changes: their kind, and `NAME.REVISION` of the record."""
        changes = [await self.change() for _ in range(count)]
        return [(kind, f"{item.name}.{item.revision}") for kind, item in changes]

    async def failure(self) -> Failure:
        """Read events until the call fails; returns its error."""
        try:
            while True:
                await self.event()
        except grpc.aio.AioRpcError as error:
            return failure_of(error)


class ContainerWatch(WatchCall[container_pb2.Container]):
    """One call of WatchContainers."""

    def __init__(self, caller: Caller, token: str = "", **filters: Any) -> None:
        selection = container_service_pb2.ContainerFilter(**filters)
        request = container_service_pb2.WatchContainersRequest(filter=selection, resume_token=token)
        super().__init__(caller.containers.WatchContainers(request), token)


class VolumeWatch(WatchCall[volume_pb2.Volume]):
    """One call of WatchVolumes."""

    def __init__(self, caller: Caller, token: str = "", **filters: Any) -> None:
        selection = volume_service_pb2.VolumeFilter(**filters)
        request = volume_service_pb2.WatchVolumesRequest(filter=selection, resume_token=token)
        super().__init__(caller.volumes.WatchVolumes(request), token)

    async def mount_changes(self, count: int) -> list[str]:
        """The next changes: kind, `NAME.REVISION`, and the containers that mount the volume, in one string."""
        changes = [await self.change() for _ in range(count)]
        return [" ".join((kind, f"{item.name}.{item.revision}", *item.attached_containers)) for kind, item in changes]


class StoreWriter:
    """Writes records of containers and volumes of another node."""

    def __init__(self, connection: EtcdConnection, prefix: str) -> None:
        self.connection = connection
        self.store = EtcdStore(connection, prefix=prefix)
        self.versions: dict[str, int] = {}

    async def put(self, name: str, revision: int, **fields: Any) -> None:
        """Write the record of a container."""
        head = container(name, revision=revision, node="elsewhere", **fields)
        change = PutContainer(head, expect=self.versions.get(name, 0))
        self.versions[name] = await self.store.apply([change])

    async def delete(self, name: str) -> None:
        """Delete the record of a container."""
        await self.store.apply([DeleteContainer(name, f"uid-{name}", self.versions.pop(name))])

    async def put_volume(self, name: str, revision: int) -> None:
        """Write the record of a volume."""
        head = volume(name, revision=revision, node="elsewhere")
        change = PutVolume(head, expect=self.versions.get(f"volume {name}", 0))
        self.versions[f"volume {name}"] = await self.store.apply([change])

    async def delete_volume(self, name: str) -> None:
        """Delete the record of a volume."""
        await self.store.apply([DeleteVolume(name, f"uid-{name}", self.versions.pop(f"volume {name}"))])

    async def compact(self) -> None:
        """Compact etcd at its current revision."""
        revision = (await self.connection.txn(success=[messages.get(b"nothing")])).revision
        request = rpc.CompactionRequest(revision=revision, physical=True)
        await self.connection._client.kvstub.Compact(request, timeout=limit(5))


@asynccontextmanager
async def open_writer(endpoint: str, prefix: str) -> AsyncIterator[StoreWriter]:
    async with open_connection(endpoint) as connection:
        yield StoreWriter(connection, prefix)
