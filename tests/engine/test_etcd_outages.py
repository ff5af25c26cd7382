"""The store while etcd is frozen, killed or unreachable, and when its responses get lost."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from aetcd import rpc
from gpudock_server.adapters.etcd import (
    EmbeddedEtcd,
    EtcdAddress,
    EtcdConnection,
    EtcdStore,
    EtcdTls,
)
from gpudock_server.adapters.etcd.client import _dial_target
from gpudock_server.errors import StoreUnavailable
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.store_changes import Claim, Lock, PutOperation, ReleaseClaim, StoreChange, Unlock
from gpudock_server.ports import StoreConflict, Versioned
from gpudock_server.startup import StartupError

from tests.engine.etcd_examples import GPU, holder, open_connection, operation
from tests.rig import Rig, freeze
from tests.rig.patience import limit

# The password of an etcd that runs for one test.
SECRET = uuid.uuid4().hex

pytest_plugins = ["tests.engine.etcd_fixtures"]


class DroppingProxy:
    """A proxy to etcd that can drop a request or a response, and then closes the connection."""

    def __init__(self, folder: Path, socket: str) -> None:
        self._path, self._socket = folder / "proxy.sock", socket
        self.drops_request = self.drops_response = False
        self.dropped = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._calls.add(asyncio.create_task(self._serve(reader, writer)))

        self._server = await asyncio.start_unix_server(serve, self._path)
        return f"unix:{self._path}"

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        # The client has closed its connections, so that these tasks end.
        await asyncio.gather(*self._calls)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        etcd_reader, etcd_writer = await asyncio.open_unix_connection(self._socket)
        pumps = {
            asyncio.create_task(self._pump(reader, etcd_writer, lambda: self.drops_request)),
            asyncio.create_task(self._pump(etcd_reader, writer, lambda: self.drops_response)),
        }
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for connection in (etcd_writer, writer):
            connection.close()
            with suppress(ConnectionError):
                await connection.wait_closed()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, drops: Callable[[], bool]
    ) -> None:
        while data := await source.read(65536):
            # Longer data belongs to a call; short data are control frames of HTTP/2.
            if drops() and len(data) > 30:
                self.drops_request = self.drops_response = False
                self.dropped.set()
                return
            target.write(data)
            await target.drain()


@pytest.mark.parametrize("lost", ["request", "response"])
async def test_a_transaction_on_a_broken_connection_is_applied_once(
    rig: Rig, store: EtcdStore, prefix: str, tmp_path: Path, lost: str
) -> None:
    proxy = DroppingProxy(tmp_path, str(rig.etcd.socket))
    async with proxy as endpoint, open_connection(endpoint) as connection:
        store_by_proxy = EtcdStore(connection, prefix=prefix)
        await store_by_proxy.open()
        first = await store_by_proxy.apply(
            [Lock(ResourceKind.CONTAINER, "web", "op1"), PutOperation(operation("op1"), expect=0)]
        )
        proxy.drops_request, proxy.drops_response = lost == "request", lost == "response"
        second = await store_by_proxy.apply(
            [PutOperation(operation("op1", message="2"), expect=first), Unlock(ResourceKind.CONTAINER, "web", "op1")]
        )
        assert proxy.dropped.is_set()
        stored = await store.operation("op1")
        assert stored == Versioned(operation("op1", message="2"), second)
        assert second == first + 1, "the transaction was applied twice"
        # A conflict is raised although the first response was lost.
        proxy.drops_request, proxy.drops_response = lost == "request", lost == "response"
        with pytest.raises(StoreConflict):
            await store_by_proxy.apply([PutOperation(operation("op1", message="3"), expect=first)])
        # A transaction that only deletes cannot be distinguished from a deletion by another client.
        await store.apply([Lock(ResourceKind.CONTAINER, "web", "op2")])
        proxy.drops_request, proxy.drops_response = lost == "request", lost == "response"
        try:
            await store_by_proxy.apply([Unlock(ResourceKind.CONTAINER, "web", "op2")])
        except StoreUnavailable:
            assert lost == "response"
        assert (await store.unfinished("n1")) == ()


@pytest.mark.deep
async def test_calls_of_a_frozen_etcd_wait_until_the_deadline_of_the_store(own_etcd: EmbeddedEtcd) -> None:
    async with open_connection(own_etcd.address.endpoints[0], timeout=0.5) as connection:
        store = EtcdStore(connection, deadline=timedelta(seconds=limit(4)))
        await store.open()
        first = await store.apply([PutOperation(operation("op1"), expect=0)])
        freeze(own_etcd.pid)
        changes: list[StoreChange] = [
            Claim("h1", GPU, holder("web")),
            PutOperation(operation("op1", message="2"), expect=first),
        ]
        applying = asyncio.create_task(store.apply(changes))
        reading = asyncio.create_task(store.container("web"))
        await asyncio.sleep(1.2)
        assert not applying.done()
        os.kill(own_etcd.pid, signal.SIGCONT)
        version = await applying
        assert await reading is None
        assert await store.operation("op1") == Versioned(operation("op1", message="2"), version)
        assert dict((await store.claims("h1")).claims) == {GPU: holder("web")}

        impatient_store = EtcdStore(connection, deadline=timedelta(seconds=1))
        freeze(own_etcd.pid)
        for call in (
            impatient_store.apply([ReleaseClaim("h1", GPU, "uid-web")]),
            impatient_store.claims("h1"),
            impatient_store.ping(),
        ):
            async with asyncio.timeout(limit(10)):
                with pytest.raises(StoreUnavailable):
                    await call
        cancelled = asyncio.create_task(store.apply([Lock(ResourceKind.CONTAINER, "web", "op")]))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        os.kill(own_etcd.pid, signal.SIGCONT)
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.ping()


@pytest.mark.deep
async def test_a_token_that_etcd_has_lost_is_renewed(own_etcd: EmbeddedEtcd) -> None:
    async with open_connection(own_etcd.address.endpoints[0]) as root:
        auth = root._client.auth_stub
        await auth.UserAdd(rpc.AuthUserAddRequest(name="root", password=SECRET), timeout=limit(5))
        await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"), timeout=limit(5))
        await auth.AuthEnable(rpc.AuthEnableRequest(), timeout=limit(5))
        with pytest.raises(StoreUnavailable, match="user name is empty"):
            await EtcdStore(root).claims("h1")
    address = EtcdAddress(own_etcd.address.endpoints, user="root", password=SECRET)
    assert SECRET not in repr(address)
    connection = EtcdConnection(address)
    await connection.open()
    store = EtcdStore(connection)
    await store.open()
    version = await store.apply([PutOperation(operation("op1"), expect=0)])
    os.kill(own_etcd.pid, signal.SIGKILL)
    stored = await asyncio.gather(*(store.operation("op1") for _ in range(10)))
    assert stored == [Versioned(operation("op1"), version)] * 10
    await connection.close()
    wrong = EtcdConnection(EtcdAddress(address.endpoints, user="root", password=SECRET[:-1]))
    with pytest.raises(StartupError, match="etcd rejected user 'root'"):
        await wrong.open()
    await wrong.close()


async def test_an_unreachable_or_invalid_endpoint_raises_an_error_with_its_name(tmp_path: Path) -> None:
    async with open_connection(f"unix:{tmp_path}/nothing.sock") as connection:
        store = EtcdStore(connection, deadline=timedelta(seconds=0.5))
        for call in (
            store.open(),
            store.container("web"),
            store.apply([Lock(ResourceKind.CONTAINER, "web", "op")]),
            store.ping(),
        ):
            with pytest.raises(StoreUnavailable, match=r"nothing\.sock"):
                await call
    for endpoint in ("http://etcd:2379", "etcd", "etcd:", ":2379", "a:1,b:2"):
        with pytest.raises(StartupError, match="invalid etcd endpoint"):
            await EtcdConnection(EtcdAddress((endpoint,))).open()


async def test_several_endpoints_and_invalid_certificates(tmp_path: Path) -> None:
    several = EtcdAddress(("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:1"))
    assert await _dial_target(several.endpoints) == "ipv4:127.0.0.1:1,127.0.0.1:2"
    assert await _dial_target(("[::1]:1", "[::1]:2")) == "ipv6:[::1]:1,[::1]:2"
    with pytest.raises(StartupError, match="cannot resolve etcd endpoint"):
        await _dial_target(("127.0.0.1:1", "nowhere.invalid:2"))
    garbage = tmp_path / "garbage.pem"
    await asyncio.to_thread(garbage.write_text, "no certificate")
    # grpc itself aborts the process for a certificate without a key, and reports no error for the others.
    for tls, reason in (
        (EtcdTls(ca=garbage), "garbage.pem"),
        (EtcdTls(ca=tmp_path / "missing.pem"), "missing.pem.*No such file"),
        (EtcdTls(certificate=garbage), "must be set together"),
        (EtcdTls(certificate=garbage, key=garbage), "garbage.pem"),
    ):
        with pytest.raises(StartupError, match=reason):
            await EtcdConnection(EtcdAddress(("127.0.0.1:1",), tls=tls)).open()
