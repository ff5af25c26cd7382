"""Bearer tokens: a file of `NAME:TOKEN` lines that an operator may edit while the daemon runs."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

import structlog

from gpudock_server.private_files import access_problem, chmod_command, read_private, read_regular
from gpudock_server.startup import StartupError

_MIN_TOKEN_CHARACTERS = 16
# A token is a b64token (RFC 6750, section 2.1); the header allows nothing else.
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._@-]{1,64}):(?P<token>[A-Za-z0-9._~+/-]+=*)", re.ASCII)
_HINT = "a line must be NAME:TOKEN; make a token with `openssl rand -hex 32`; # starts a comment"

_log = structlog.stdlib.get_logger("gpudock.rpc")


class TokenFile:
    """The valid tokens. A name may have several, so that a token can be replaced without an interruption.

    The file is read again when it has changed. Invalid lines, or a missing file, are logged and give no tokens: a token
    that was removed must not stay valid because of a mistake elsewhere in the file. While other users of the host can
    read or write the file, new tokens are ignored; tokens that were valid before and are still in the file stay valid.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises StartupError, also for invalid lines."""
        self._path = path
        content, found = read_private(path, "token_file")
        self._version: tuple[int, ...] | None = _version(found)
        try:
            self._names, mistakes = _parse(content.decode())
        except UnicodeDecodeError as error:
            raise StartupError(f"token_file {path} cannot be read: {error}", "it must be a UTF-8 file") from error
        if mistakes:
            raise StartupError(f"token_file {path}: {'; '.join(mistakes)}", _HINT)

    def name_of(self, token: str) -> str | None:
        """The name of the caller who has `token`; None if the token is not valid."""
        self._refresh()
        digest = _digest(token)
        # All tokens are compared, and by digest, so that the time reveals neither a token nor its length.
        found = [name for known, name in self._names.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    def _refresh(self) -> None:
        try:
            version = _version(self._path.stat())
            if version == self._version:
                return
            content, found = read_regular(self._path)
            version = _version(found)
            names, mistakes = _parse(content.decode())
            if exposed := access_problem(found):
                names = {digest: name for digest, name in names.items() if self._names.get(digest) == name}
                mistakes = [f"the file {exposed}; new tokens are ignored until: {chmod_command(self._path)}", *mistakes]
        except (OSError, UnicodeDecodeError) as error:
            version, names, mistakes = None, {}, [str(error)]
        if version != self._version:
            _log.info("token file reloaded", path=str(self._path), names=sorted(set(names.values())))
            if mistakes:
                _log.error("invalid lines in token file ignored", path=str(self._path), mistakes=mistakes)
        self._version, self._names = version, names


def _version(found: os.stat_result) -> tuple[int, ...]:
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid, found.st_gid


def _parse(text: str) -> tuple[dict[bytes, str], list[str]]:
    """Token digests with their names, and what is wrong with invalid lines; never the lines, which may hold tokens."""
    names: dict[bytes, str] = {}
    mistakes: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        found = _LINE.fullmatch(content)
        if found is None:
            mistakes.append(f"line {number}: must be NAME:TOKEN")
        elif len(found["token"]) < _MIN_TOKEN_CHARACTERS:
            mistakes.append(f"line {number}: token is shorter than {_MIN_TOKEN_CHARACTERS} characters")
        else:
            names[_digest(found["token"])] = found["name"]
    return names, mistakes


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
