"""Bearer tokens: a file of `name:token` lines that an operator edits while the daemon runs."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

import structlog

from gpudock_server.private_files import access_problem, chmod_command, read_private, read_regular
from gpudock_server.startup import StartupError

_SHORTEST = 16
# The token is a b64token (RFC 6750, section 2.1), which is all that fits into the header.
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._@-]{1,64}):(?P<token>[A-Za-z0-9._~+/-]+=*)", re.ASCII)
_HINT = "a line is NAME:TOKEN, with a token of `openssl rand -hex 32`; # begins a comment"

_log = structlog.stdlib.get_logger("gpudock.rpc")


class TokenFile:
    """The tokens that are good now. A name may have several, so that one can be replaced without a gap.

    The file is read again when it has changed. Lines that went wrong then, or a file that went away, count for nothing
    and are logged: what an operator took out must not stay good because of a slip elsewhere. A file that other users of
    the host may read or write adds no token: of those that were good before, the ones that are still in it stay good.
    """

    def __init__(self, path: Path) -> None:
        """Read it for the first time, when every mistake is refused. Raises StartupError."""
        self._path = path
        content, found = read_private(path, "token_file")
        self._version: tuple[int, ...] | None = _version(found)
        try:
            self._names, mistakes = _parse(content.decode())
        except UnicodeDecodeError as error:
            raise StartupError(f"token_file {path} cannot be read: {error}", "change token_file") from error
        if mistakes:
            raise StartupError(f"token_file {path}: {'; '.join(mistakes)}", _HINT)

    def name_of(self, token: str) -> str | None:
        """The name that `token` stands for; None when it is not good."""
        self._refresh()
        digest = _digest(token)
        # All are compared, so that the time tells nothing; digests, so that their length does not.
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
                mistakes = [f"the file {exposed}, so nothing is added: {chmod_command(self._path)}", *mistakes]
        except (OSError, UnicodeDecodeError) as error:
            version, names, mistakes = None, {}, [str(error)]
        if version != self._version:
            _log.info("tokens read again", path=str(self._path), names=sorted(set(names.values())))
            if mistakes:
                _log.error("tokens that count for nothing", path=str(self._path), mistakes=mistakes)
        self._version, self._names = version, names


def _version(found: os.stat_result) -> tuple[int, ...]:
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid, found.st_gid


def _parse(text: str) -> tuple[dict[bytes, str], list[str]]:
    """Digests of tokens with their names, and what is wrong with the other lines; never the lines themselves."""
    names: dict[bytes, str] = {}
    mistakes: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        found = _LINE.fullmatch(content)
        if found is None:
            mistakes.append(f"line {number} is not NAME:TOKEN")
        elif len(found["token"]) < _SHORTEST:
            mistakes.append(f"line {number} has a token of fewer than {_SHORTEST} characters")
        else:
            names[_digest(found["token"])] = found["name"]
    return names, mistakes


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
