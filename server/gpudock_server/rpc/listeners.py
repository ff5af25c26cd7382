"""Binds the addresses of the daemon: a unix socket with its mode and group, and TCP addresses with TLS.

grpc replaces a socket file even if another server listens on it, shares a TCP port with any process that allows it, and
accepts any text as a certificate. So this module checks everything first and refuses with a reason.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

import grpc
import grpc.aio

from gpudock_server.private_files import read_private
from gpudock_server.settings.definitions import Settings
from gpudock_server.settings.value_types import split_address
from gpudock_server.startup import StartupError

# Options for grpc.aio.server: without them two daemons could share a port, and each would get half of the calls.
SERVER_OPTIONS = (("grpc.so_reuseport", 0),)


class Listeners:
    """The bound addresses of a server. Close them after the server has stopped."""

    def __init__(self, addresses: tuple[str, ...], resources: ExitStack) -> None:
        self.addresses = addresses
        self._resources = resources

    def close(self) -> None:
        """Release the lock of the unix socket."""
        self._resources.close()


def listen(server: grpc.aio.Server, settings: Settings) -> Listeners:
    """Bind the addresses of `settings`; the server accepts calls once it is started. Raises StartupError."""
    with ExitStack() as resources:
        addresses: list[str] = []
        if settings.socket is not None:
            resources.enter_context(_socket_lock(settings.socket))
            _bind_unix(server, settings.socket, settings.socket_mode, _group_id(settings.socket_group))
            addresses.append(f"unix:{settings.socket}")
        credentials = _tls_credentials(settings)
        addresses += [_bind_tcp(server, address, credentials) for address in settings.listen]
        return Listeners(tuple(addresses), resources.pop_all())


@contextmanager
def _socket_lock(path: Path) -> Iterator[None]:
    """Hold the lock file of the socket. It is never removed: two daemons could then lock two files of that name."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _listen_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            raise StartupError(
                f"another gpudockd (pid {holder}) listens on {path}",
                "stop it, or set another --socket, --state-dir and --node-name",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _bind_unix(server: grpc.aio.Server, path: Path, mode: int, group: int | None) -> None:
    try:
        _remove_stale_socket(path)
        # Created without access for others, until its group is set. The umask applies to the whole process, so nothing
        # else may run meanwhile: no await in here.
        umask = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{quote(str(path))}")
        finally:
            os.umask(umask)
        if group is not None:
            os.chown(path, -1, group)
        path.chmod(mode)
    except OSError as error:
        raise _listen_error(path, error) from error
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {path}: {error}", _SOCKET_HINT) from error


def _remove_stale_socket(path: Path) -> None:
    """Remove the socket of a daemon that was killed. Raises StartupError if a program uses it or it is not a socket."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise StartupError(f"{path} exists and is not a socket", "remove it, or set another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            # The backlog is full, so a program listens.
            pass
    raise StartupError(f"another program listens on {path}", "stop it, or set another --socket")


_SOCKET_HINT = "run as root, or set --socket to a path in a writable directory"


def _listen_error(path: Path, error: OSError) -> StartupError:
    return StartupError(f"cannot listen on {path}: {error.strerror or error}", _SOCKET_HINT)


def _group_id(name: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise StartupError(
            f"group {name!r} of socket_group not found on this host",
            f"groupadd --system {name}, or change socket_group",
        ) from None


def _bind_tcp(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    host, port = split_address(address)
    _check_bindable(address, host, port)
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {address}: {error}", _TCP_HINTS[0]) from error
    return f"{address.rpartition(':')[0]}:{bound}"


_TCP_HINTS = {
    0: "set --listen to another address",
    errno.EADDRINUSE: "find the program with `ss -ltnp` and stop it, or set --listen to another port",
    errno.EADDRNOTAVAIL: "`ip address` lists the addresses of this host; 0.0.0.0 stands for all of them",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
}


def _check_bindable(address: str, host: str, port: int) -> None:
    """Bind the address once without SO_REUSEPORT, to get the reason of a failure, which grpc does not give."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartupError(f"cannot listen on {address}: {error.strerror}", _TCP_HINTS[0]) from error
    failures: list[OSError] = []
    for family, kind, protocol, _name, target in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(target)
            except OSError as error:
                failures.append(error)
    taken = [error for error in failures if error.errno == errno.EADDRINUSE]
    # A name such as localhost may have an IPv6 address that this host lacks; one working address is enough.
    if taken or len(failures) == len(found):
        first = (taken or failures)[0]
        hint = _TCP_HINTS.get(first.errno or 0, _TCP_HINTS[0])
        raise StartupError(f"cannot listen on {address}: {first.strerror}", hint) from first


def _tls_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The TLS credentials; None without a certificate, which settings allow on loopback addresses only."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    certificate = _read_file(settings.tls_cert, "tls_cert")
    key, _ = read_private(settings.tls_key, "tls_key")
    client_ca = _read_file(settings.tls_client_ca, "tls_client_ca") if settings.tls_client_ca else None
    # Python's ssl reports what is wrong; grpc would listen and then fail each handshake.
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without `password`, ssl would ask on the terminal for the password of an encrypted key.
        check.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise StartupError(
            f"tls_cert {settings.tls_cert} and tls_key {settings.tls_key} cannot be used: {_reason(error)}",
            "both must be PEM; the key must be unencrypted and match the first certificate",
        ) from error
    if settings.tls_client_ca is not None:
        try:
            check.load_verify_locations(settings.tls_client_ca)
        except ssl.SSLError as error:
            raise StartupError(
                f"tls_client_ca {settings.tls_client_ca} cannot be used: {_reason(error)}",
                "it must hold the PEM certificates of the authorities that sign client certificates",
            ) from error
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or str(error)
    return str(reason).lower().replace("_", " ")


def _read_file(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(
            f"{setting} {path} cannot be read: {error.strerror}", f"set {setting} to a readable file"
        ) from error
