"""Where the daemon is called: a unix socket whose mode says who may, and TCP addresses with TLS.

grpc takes whatever socket file lies at its path, also one that is being served on, shares a TCP port with any process
that lets it, and takes any text for a certificate. So everything is tried here first, and refused with a reason.
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

# For grpc.aio.server(options=…): two daemons must not share a port and each get half of the calls.
SERVER_OPTIONS = (("grpc.so_reuseport", 0),)


class Listeners:
    """What a server listens on. Close it after the server has stopped."""

    def __init__(self, addresses: tuple[str, ...], resources: ExitStack) -> None:
        self.addresses = addresses
        self._resources = resources

    def close(self) -> None:
        """Let another daemon have the unix socket."""
        self._resources.close()


def listen(server: grpc.aio.Server, settings: Settings) -> Listeners:
    """Bind everything that `settings` name; calls are taken once the server is started. Raises StartupError."""
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
    """Hold the lock beside the socket. Its file stays: removed, two daemons could each lock one of that name."""
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
                f"another gpudockd (pid {holder}) serves on {path}",
                "stop that one, or give this one its own --socket, --state-dir and --node-name",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _bind_unix(server: grpc.aio.Server, path: Path, mode: int, group: int | None) -> None:
    try:
        _remove_stale_socket(path)
        # Made for the daemon alone, and opened to others only when it has its group. The umask is the process's, so
        # nothing else may run meanwhile: no await in here.
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
    """Remove what a daemon that was killed left; refuse where somebody listens, or where it is no socket at all."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise StartupError(f"{path} exists and is not a socket", "remove it, or choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            # Its queue is full: somebody is there.
            pass
    raise StartupError(f"another program serves on {path}", "stop it, or choose another --socket")


_SOCKET_HINT = "run as root, or choose a --socket in a folder that you may write to"


def _listen_error(path: Path, error: OSError) -> StartupError:
    return StartupError(f"cannot listen on {path}: {error.strerror or error}", _SOCKET_HINT)


def _group_id(name: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise StartupError(
            f"there is no group {name!r} for the unix socket", f"groupadd --system {name}, or change socket_group"
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
    0: "choose another --listen",
    errno.EADDRINUSE: "`ss -ltnp` shows who has it; stop that one or choose another --listen",
    errno.EADDRNOTAVAIL: "this host has no such address (`ip address` shows which it has); 0.0.0.0 is all of them",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
}


def _check_bindable(address: str, host: str, port: int) -> None:
    """Bind it once without SO_REUSEPORT, for the kernel's reason: grpc has none but `failed`."""
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
    # A name like localhost may stand for an address of IPv6 that this host has not; one that works is enough.
    if taken or len(failures) == len(found):
        first = (taken or failures)[0]
        hint = _TCP_HINTS.get(first.errno or 0, _TCP_HINTS[0])
        raise StartupError(f"cannot listen on {address}: {first.strerror}", hint) from first


def _tls_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """None where there is no certificate: settings allow that on loopback alone."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    certificate = _read_file(settings.tls_cert, "tls_cert")
    key, _ = read_private(settings.tls_key, "tls_key")
    client_ca = _read_file(settings.tls_client_ca, "tls_client_ca") if settings.tls_client_ca else None
    # Python's ssl says what is wrong with them; grpc would listen, and fail at every handshake.
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key would else be asked for on the terminal.
        check.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise StartupError(
            f"tls_cert {settings.tls_cert} and tls_key {settings.tls_key} cannot be used: {_reason(error)}",
            "both are PEM, the key is not encrypted and is that of the first certificate",
        ) from error
    if settings.tls_client_ca is not None:
        try:
            check.load_verify_locations(settings.tls_client_ca)
        except ssl.SSLError as error:
            raise StartupError(
                f"tls_client_ca {settings.tls_client_ca} cannot be used: {_reason(error)}",
                "it holds the certificates, in PEM, of the authorities that sign your clients' certificates",
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
        raise StartupError(f"{setting} {path} cannot be read: {error.strerror}", f"change {setting}") from error
