"""The address of an engine and how to connect to it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from gpudock_server.private_files import access_problem, chmod_command

_PLAIN_PORT = 2375
_TLS_PORT = 2376
_TLS_FILES = ("ca.pem", "cert.pem", "key.pem")


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """A unix socket (`path`) or a TCP endpoint (`host`, `port`); `tls` is set if the connection is encrypted."""

    path: str = ""
    host: str = "localhost"
    port: int = 0
    tls: ssl.SSLContext | None = None

    @classmethod
    def parse(cls, url: str, tls_folder: Path | None) -> EngineAddress:
        """Read `unix:///PATH`, `tcp://HOST:PORT` or `https://HOST:PORT`.

        `tls_folder` holds ca.pem, cert.pem and key.pem, as for `docker --tlsverify`; with it, tcp:// is encrypted.
        Blocks while it reads these three small files. Raises ValueError for anything else, with what to do.
        """
        parts = urlsplit(url)
        if parts.scheme == "unix":
            if not parts.path.startswith("/") or parts.netloc:
                raise ValueError(f"invalid engine address {url!r}: a unix socket is written unix:///ABSOLUTE/PATH")
            if tls_folder is not None:
                raise ValueError(f"engine address {url!r} is a unix socket, which has no TLS; remove the TLS folder")
            return cls(path=parts.path)
        if parts.scheme not in ("tcp", "http", "https") or not parts.hostname:
            raise ValueError(f"invalid engine address {url!r}: use unix:///PATH or tcp://HOST:PORT")
        context = _client_context(tls_folder) if tls_folder else None
        if parts.scheme == "https" and context is None:
            context = ssl.create_default_context()
        port = parts.port or (_TLS_PORT if context else _PLAIN_PORT)
        return cls(host=parts.hostname, port=port, tls=context)

    @property
    def http_url(self) -> str:
        """The base of the API's URLs; for a unix socket the host in it is a placeholder."""
        if self.path:
            return "http://localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    def connector(self, limit: int) -> aiohttp.BaseConnector:
        """A pool of at most `limit` connections to this address; 0 means no limit. Needs a running event loop."""
        if self.path:
            return aiohttp.UnixConnector(self.path, limit=limit)
        # ssl=True means "the default context for https URLs"; http URLs ignore it.
        return aiohttp.TCPConnector(ssl=self.tls or True, limit=limit)


def _client_context(folder: Path) -> ssl.SSLContext:
    missing = [name for name in _TLS_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"TLS folder {folder} is missing {', '.join(missing)}")
    if exposed := access_problem((folder / "key.pem").stat()):
        raise ValueError(f"{folder}/key.pem {exposed}; {chmod_command(folder / 'key.pem')}")
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    except ssl.SSLError as error:
        raise ValueError(f"cannot load the certificates in {folder}: {error}") from error
    return context
