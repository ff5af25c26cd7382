"""The addresses that the daemon listens on, and the errors for those that it cannot."""

from __future__ import annotations

import asyncio
import grp
import os
import socket
import stat
import sys
from pathlib import Path

import grpc.aio
import pytest
from gpudock_server.rpc.listeners import listen
from gpudock_server.settings.definitions import Settings
from gpudock_server.startup import StartupError

from tests.rpc.certificates import Authority
from tests.rpc.probe import Probe, call, serve_probe

TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105 - an example


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"ci:{TOKEN}\n")
    path.chmod(0o600)
    return path


async def refusal(settings: Settings) -> StartupError:
    server = grpc.aio.server()
    with pytest.raises(StartupError) as raised:
        listen(server, settings)
    await server.stop(None)
    assert raised.value.hint, "the error has no hint"
    return raised.value


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("expected", [0o600, 0o660])
async def test_the_socket_has_its_mode_and_was_never_wider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: int
) -> None:
    path = tmp_path / "run" / "gpudock.sock"
    modes: list[int] = []
    chmod = Path.chmod

    def spying(self: Path, mode: int, **options: bool) -> None:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        chmod(self, mode, **options)

    monkeypatch.setattr(Path, "chmod", spying)
    before = os.umask(0)
    try:
        async with serve_probe(Probe(), Settings(socket=path, socket_mode=expected)) as addresses:
            assert os.umask(0) == 0, "the umask of the process was changed"
            assert addresses == (f"unix:{path}",)
            assert (modes, mode(path)) == ([0o600], expected)
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                await call(channel, "OneToOne")
    finally:
        os.umask(before)
    assert not path.exists()


async def test_the_socket_belongs_to_its_group(tmp_path: Path) -> None:
    group = grp.getgrall()[-1]
    path = tmp_path / "gpudock.sock"
    async with serve_probe(Probe(), Settings(socket=path, socket_group=group.gr_name)):
        assert path.stat().st_gid == group.gr_gid
    error = await refusal(Settings(socket=path, socket_group="no-such-group"))
    assert "'no-such-group'" in error.message


async def test_a_second_daemon_is_refused_and_the_first_continues(tmp_path: Path) -> None:
    settings = Settings(socket=tmp_path / "gpudock.sock")
    async with serve_probe(Probe(), settings):
        error = await refusal(settings)
        assert f"another gpudockd (pid {os.getpid()}) listens on {settings.socket}" in error.message
        async with grpc.aio.insecure_channel(f"unix:{settings.socket}") as channel:
            await call(channel, "OneToOne")
    async with serve_probe(Probe(), settings):
        pass


async def test_a_socket_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gpudock.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "another program listens" in (await refusal(Settings(socket=path))).message
        assert path.exists()


async def test_the_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gpudock.sock"
    code = "import socket,sys,os; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); os._exit(9)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, path)
    assert await process.wait() == 9
    assert path.is_socket()
    async with (
        serve_probe(Probe(), Settings(socket=path)),
        grpc.aio.insecure_channel(f"unix:{path}") as channel,
    ):
        await call(channel, "OneToOne")


async def test_a_file_at_the_path_of_the_socket_is_kept_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpudock.sock"
    path.write_text("precious")
    assert "is not a socket" in (await refusal(Settings(socket=path))).message
    assert path.read_text() == "precious"


async def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    error = await refusal(Settings(socket=tmp_path / "a" / "b" / "gpudock.sock"))
    assert "No such file or directory" in error.message
    (tmp_path / "file").touch()
    error = await refusal(Settings(socket=tmp_path / "file" / "gpudock.sock"))
    assert "Not a directory" in error.message or "File exists" in error.message


async def test_a_port_in_use_is_refused(token_file: Path) -> None:
    with socket.socket() as other:
        # With SO_REUSEPORT, the default of grpc servers, both would share the port and each get half of the calls.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        error = await refusal(Settings(socket=None, listen=(address,), token_file=token_file))
    assert error.message == f"cannot listen on {address}: Address already in use"


async def test_a_port_is_not_shared_with_a_second_daemon(token_file: Path) -> None:
    settings = Settings(socket=None, listen=("127.0.0.1:0",), token_file=token_file)
    async with serve_probe(Probe(), settings) as (address,):
        await refusal(Settings(socket=None, listen=(address,), token_file=token_file))


async def test_an_address_of_another_host_is_refused(token_file: Path, authority: Authority) -> None:
    signed = authority.sign("server")
    settings = Settings(
        socket=None,
        listen=("192.0.2.1:0",),
        token_file=token_file,
        tls_cert=signed.certificate,
        tls_key=signed.key,
    )
    assert "Cannot assign requested address" in (await refusal(settings)).message


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_bad_certificates_are_refused_at_start(tmp_path: Path, token_file: Path, authority: Authority) -> None:
    first, other = authority.sign("one"), authority.sign("other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    encrypted = authority.encrypt_key(first)

    async def message(certificate: Path, key: Path, client_ca: Path | None = None) -> str:
        settings = Settings(
            socket=None,
            listen=("127.0.0.1:0",),
            token_file=token_file,
            tls_cert=certificate,
            tls_key=key,
            tls_client_ca=client_ca,
        )
        return (await refusal(settings)).message

    assert "key values mismatch" in await message(first.certificate, other.key)
    assert f"tls_cert {garbage}" in await message(garbage, first.key)
    assert f"tls_key {encrypted}" in await message(first.certificate, encrypted)
    assert f"tls_client_ca {garbage}" in await message(first.certificate, first.key, garbage)
    first.key.chmod(0o644)
    assert await message(first.certificate, first.key) == (
        f"tls_key {first.key} is accessible to every user of this host (mode 0644)"
    )
    first.key.chmod(0o600)
    missing = tmp_path / "missing"
    assert await message(missing, first.key) == f"tls_cert {missing} cannot be read: No such file or directory"
