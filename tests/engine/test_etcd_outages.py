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

# Of an etcd that lives as long as one test.
SECRET = uuid.uuid4().hex

pytest_plugins = ["tests.engine.etcd_fixtures"]


class AnswerThief:
    """A proxy to etcd that can drop requests or responses, and then closes the connection."""

    def __init__(self, folder: Path, socket: str) -> None:
        self._path, self._socket = folder / "thief.sock", socket
        self.steals_requests = self.steals_answers = False
        self.stolen = asyncio.Event()
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
        # The client has closed its side, which ends them.
        await asyncio.gather(*self._calls)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket)
        pumps = {
            asyncio.create_task(self._pump(reader, back, lambda: self.steals_requests)),
            asyncio.create_task(self._pump(there, writer, lambda: self.steals_answers)),
        }
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for side in (back, writer):
            side.close()
            with suppress(ConnectionError):
                await side.wait_closed()

    async def _pump(self, come: asyncio.StreamReader, go: asyncio.StreamWriter, steals: Callable[[], bool]) -> None:
        while data := await come.read(65536):
            # A frame that is longer than its header belongs to a call; the others are HTTP/2's own small talk.
            if steals() and len(data) > 30:
                self.steals_requests = self.steals_answers = False
                self.stolen.set()
                return
            go.write(data)
            await go.drain()


@pytest.mark.parametrize("what", ["request", "answer"])
async def test_a_broken_connection_leaves_no_doubt(
    rig: Rig, store: EtcdStore, prefix: str, tmp_path: Path, what: str
) -> None:
    thief = AnswerThief(tmp_path, str(rig.etcd.socket))
    async with thief as endpoint, open_connection(endpoint) as connection:
        robbed = EtcdStore(connection, prefix=prefix)
        await robbed.open()
        first = await robbed.apply(
            [Lock(ResourceKind.CONTAINER, "web", "op1"), PutOperation(operation("op1"), expect=0)]
        )
        thief.steals_requests, thief.steals_answers = what == "request", what == "answer"
        second = await robbed.apply(
            [PutOperation(operation("op1", message="2"), expect=first), Unlock(ResourceKind.CONTAINER, "web", "op1")]
        )
        assert thief.stolen.is_set()
        stored = await store.operation("op1")
        assert stored == Versioned(operation("op1", message="2"), second)
        assert second == first + 1, "it happened once"
        # The same for one that had no chance: the conflict is told, although the first answer was lost.
        thief.steals_requests, thief.steals_answers = what == "request", what == "answer"
        with pytest.raises(StoreConflict):
            await robbed.apply([PutOperation(operation("op1", message="3"), expect=first)])
        # What only deletes cannot be told apart from what somebody else deleted.
        await store.apply([Lock(ResourceKind.CONTAINER, "web", "op2")])
        thief.steals_requests, thief.steals_answers = what == "request", what == "answer"
        try:
            await robbed.apply([Unlock(ResourceKind.CONTAINER, "web", "op2")])
        except StoreUnavailable:
            assert what == "answer"
        assert (await store.unfinished("n1")) == ()


@pytest.mark.deep
async def test_an_etcd_that_stands_still(own_etcd: EmbeddedEtcd) -> None:
    async with open_connection(own_etcd.address.endpoints[0], timeout=0.5) as connection:
        store = EtcdStore(connection, deadline=timedelta(seconds=4))
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

        hasty = EtcdStore(connection, deadline=timedelta(seconds=1))
        freeze(own_etcd.pid)
        for call in (hasty.apply([ReleaseClaim("h1", GPU, "uid-web")]), hasty.claims("h1"), hasty.ping()):
            async with asyncio.timeout(3):
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
async def test_a_token_that_etcd_has_forgotten_is_renewed(own_etcd: EmbeddedEtcd) -> None:
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


async def test_a_store_that_is_out_of_reach(tmp_path: Path) -> None:
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


async def test_several_endpoints_and_certificates(tmp_path: Path) -> None:
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
