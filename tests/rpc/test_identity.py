"""Authentication of TCP callers: tokens and certificates."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from gpudock_server.rpc.middleware.bearer_tokens import TokenFile
from gpudock_server.rpc.middleware.identity import Caller, CallerKind, caller
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.settings.definitions import Settings
from gpudock_server.startup import StartupError
from structlog.testing import capture_logs

from tests.rpc.certificates import Authority, Signed
from tests.rpc.in_memory_server import reason_of
from tests.rpc.probe import KINDS, Probe, call, serve_probe

TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105 - an example
OTHER = "fedcba9876543210fedcba9876543210"
BEARER = (("authorization", f"Bearer {TOKEN}"),)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# callers\n\nci:{TOKEN}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server_certificate(authority: Authority) -> Signed:
    return authority.sign("server", "IP:127.0.0.1")


class CallerProbe(Probe):
    """A probe that records its callers."""

    def __init__(self) -> None:
        super().__init__(self._record_caller)
        self.callers: list[Caller] = []

    async def _record_caller(self, _context: Context) -> None:
        self.callers.append(caller())


@asynccontextmanager
async def connected(
    probe: Probe, settings: Settings, credentials: grpc.ChannelCredentials | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    async with serve_probe(probe, settings) as (address,):
        opened = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
        async with opened as channel:
            yield channel


def on_loopback(token_file: Path) -> Settings:
    return Settings(socket=None, listen=("127.0.0.1:0",), token_file=token_file)


async def authentication_error(channel: grpc.aio.Channel, kind: str = "OneToOne", header: str | None = None) -> str:
    metadata = (("authorization", header),) if header is not None else ()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        # Without requests: a grpc.aio client can lose a response that arrives while it writes (grpc issue 36066).
        await call(channel, kind, metadata=metadata, requests=())
    assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    return raised.value.details() or ""


@pytest.mark.parametrize("kind", KINDS)
async def test_a_token_identifies_its_caller_and_is_required(token_file: Path, kind: str) -> None:
    probe = CallerProbe()
    async with connected(probe, on_loopback(token_file)) as channel:
        await call(channel, kind, metadata=BEARER)
        assert probe.callers == [Caller(CallerKind.TOKEN, "ci")]
        assert "the scheme `Bearer` and a token" in await authentication_error(channel, kind)
        for header in (f"Bearer {OTHER}", "Bearer", "Bearer ", "Basic Y2k6Y2k=", TOKEN, f"Bearer {TOKEN[:-1]}", ""):
            answer = await authentication_error(channel, kind, header)
            assert OTHER not in answer
            assert TOKEN[:-1] not in answer
    assert len(probe.callers) == 1


async def test_only_health_is_served_without_an_identity(token_file: Path) -> None:
    probe = CallerProbe()
    async with connected(probe, on_loopback(token_file)) as channel:
        await call(channel, "OneToOne", service="grpc.health.v1.Health")
        assert probe.callers == [Caller(CallerKind.ANONYMOUS)]
        await authentication_error(channel)


async def test_a_refused_call_is_audited_and_no_token_is_logged(token_file: Path) -> None:
    async with connected(CallerProbe(), on_loopback(token_file)) as channel:
        with capture_logs() as logged:
            await authentication_error(channel, header=f"Bearer {OTHER}")
            await call(channel, "OneToOne", metadata=BEARER)
    lines = [(line["caller_kind"], line["caller"], line["outcome"]) for line in logged if line["event"] == "call"]
    assert lines == [("nobody", "", "UNAUTHENTICATED"), ("token", "ci", "OK")]
    assert OTHER not in str(logged)
    assert TOKEN not in str(logged)


def rewrite(path: Path, text: str, later: int) -> None:
    """Write a file with an mtime `later` seconds later, since two writes within a clock tick have the same mtime."""
    found = path.stat()
    path.write_text(text)
    os.utime(path, (found.st_atime, found.st_mtime + later))


async def test_tokens_are_read_again_when_their_file_changes(token_file: Path) -> None:
    async with connected(CallerProbe(), on_loopback(token_file)) as channel:
        rewrite(token_file, f"ci:{OTHER}\nops:{TOKEN[::-1]}\n", later=1)
        await authentication_error(channel, header=f"Bearer {TOKEN}")
        await call(channel, "OneToOne", metadata=(("authorization", f"bearer {OTHER}"),))
        # An invalid line is ignored; removed tokens are still removed, and other lines still count.
        rewrite(token_file, f"ci:{TOKEN}\nops {OTHER}\n", later=2)
        with capture_logs() as logged:
            await call(channel, "OneToOne", metadata=BEARER)
            await authentication_error(channel, header=f"Bearer {OTHER}")
        assert [line["mistakes"] for line in logged if "mistakes" in line] == [["line 2: must be NAME:TOKEN"]]
        rewrite(token_file, "", later=3)
        await authentication_error(channel, header=f"Bearer {TOKEN}")


def test_tokens_of_a_removed_file_are_invalid(token_file: Path) -> None:
    tokens = TokenFile(token_file)
    assert tokens.name_of(TOKEN) == "ci"
    moved = token_file.rename(token_file.with_name("moved"))
    assert tokens.name_of(TOKEN) is None
    moved.rename(token_file)
    assert tokens.name_of(TOKEN) == "ci"


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (f"ci:{TOKEN}", 0o644, "is accessible to every user of this host (mode 0644)"),
        (f"ci:{TOKEN}", 0o602, "is accessible to every user of this host (mode 0602)"),
        (f"ci {TOKEN}", 0o600, "line 1: must be NAME:TOKEN"),
        ("\nci:short", 0o600, "line 2: token is shorter than 16 characters"),
        (f"\nci:{TOKEN} {TOKEN}", 0o600, "line 2: must be NAME:TOKEN"),
    ],
)
def test_a_bad_token_file_is_refused_at_start(tmp_path: Path, text: str, mode: int, message: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(StartupError) as raised:
        TokenFile(path)
    assert message in raised.value.message
    assert TOKEN not in str(raised.value)


def test_a_token_file_of_another_user_or_group_is_refused_at_start(token_file: Path) -> None:
    token_file.chmod(0o640)
    os.chown(token_file, 0, 0)
    assert TokenFile(token_file).name_of(TOKEN) == "ci", "group root was refused"
    os.chown(token_file, 0, 12345)
    with pytest.raises(StartupError, match=r"is accessible to group 12345 \(mode 0640\)\n.*chmod 600"):
        TokenFile(token_file)
    token_file.chmod(0o600)
    os.chown(token_file, 12345, 0)
    with pytest.raises(StartupError, match="is owned by uid 12345; it must be root"):
        TokenFile(token_file)


def test_a_file_readable_by_others_adds_no_tokens_and_still_removes_some(token_file: Path) -> None:
    added = "a" * 32
    token_file.write_text(f"ci:{TOKEN}\nops:{OTHER}\n")
    tokens = TokenFile(token_file)
    token_file.chmod(0o644)
    rewrite(token_file, f"ci:{TOKEN}\nadded:{added}\n", later=1)
    with capture_logs() as logged:
        assert [tokens.name_of(token) for token in (TOKEN, OTHER, added)] == ["ci", None, None]
        assert tokens.name_of(TOKEN) == "ci"
    (line,) = [line for line in logged if line["log_level"] == "error"]
    assert f"chmod 600 {token_file}" in line["mistakes"][0]
    # The mode alone counts as a change.
    token_file.chmod(0o600)
    assert [tokens.name_of(token) for token in (TOKEN, OTHER, added)] == ["ci", None, "added"]
    token_file.chmod(0o604)
    assert tokens.name_of(TOKEN) == "ci"
    token_file.chmod(0o600)


@pytest.mark.timeout(20)
def test_a_token_file_that_is_a_fifo_is_refused_without_waiting(token_file: Path) -> None:
    token_file.write_text(f"ci:{TOKEN}\n")
    tokens = TokenFile(token_file)
    token_file.unlink()
    os.mkfifo(token_file, 0o600)
    with capture_logs() as logged:
        assert tokens.name_of(TOKEN) is None
    assert any("not a regular file" in str(line.get("mistakes")) for line in logged)
    with pytest.raises(StartupError, match="not a regular file"):
        TokenFile(token_file)


def test_a_token_file_that_is_too_large_is_refused(token_file: Path) -> None:
    token_file.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(StartupError, match="larger than"):
        TokenFile(token_file)


def test_a_missing_token_file_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read"):
        TokenFile(tmp_path / "missing")


async def test_a_verified_client_certificate_identifies_its_caller(
    authority: Authority, server_certificate: Signed
) -> None:
    settings = Settings(
        socket=None,
        listen=("127.0.0.1:0",),
        tls_cert=server_certificate.certificate,
        tls_key=server_certificate.key,
        tls_client_ca=authority.own.certificate,
    )
    client = authority.sign("alice")
    trusted = authority.own.certificate.read_bytes()
    probe = CallerProbe()
    credentials = grpc.ssl_channel_credentials(trusted, client.key.read_bytes(), client.certificate.read_bytes())
    async with connected(probe, settings, credentials) as channel:
        await call(channel, "OneToOne")
        assert probe.callers == [Caller(CallerKind.CERTIFICATE, "alice")]
        assert probe.callers[0].log_fields() == {"caller_kind": "certificate", "caller": "alice"}
        # A wrong token is refused even with a valid certificate.
        await authentication_error(channel, header=f"Bearer {TOKEN}")


async def test_a_certificate_of_another_authority_is_refused(
    tmp_path: Path, authority: Authority, server_certificate: Signed
) -> None:
    settings = Settings(
        socket=None,
        listen=("127.0.0.1:0",),
        tls_cert=server_certificate.certificate,
        tls_key=server_certificate.key,
        tls_client_ca=authority.own.certificate,
    )
    other_client = Authority(tmp_path, "other_client").sign("alice")
    trusted = authority.own.certificate.read_bytes()
    probe = CallerProbe()
    for credentials in (
        grpc.ssl_channel_credentials(trusted),
        grpc.ssl_channel_credentials(trusted, other_client.key.read_bytes(), other_client.certificate.read_bytes()),
    ):
        async with connected(probe, settings, credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(channel, "OneToOne")
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert probe.callers == []


async def test_a_token_is_accepted_over_tls(token_file: Path, authority: Authority, server_certificate: Signed) -> None:
    settings = Settings(
        socket=None,
        listen=("127.0.0.1:0",),
        tls_cert=server_certificate.certificate,
        tls_key=server_certificate.key,
        token_file=token_file,
    )
    probe = CallerProbe()
    credentials = grpc.ssl_channel_credentials(authority.own.certificate.read_bytes())
    async with connected(probe, settings, credentials) as channel:
        await call(channel, "OneToOne", metadata=BEARER)
        await authentication_error(channel)
    assert probe.callers == [Caller(CallerKind.TOKEN, "ci")]
