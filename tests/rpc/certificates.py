"""Certificates that are valid for a day, created by the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Signed:
    """A certificate and its private key, both PEM."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority with its files in `folder`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self.own = Signed(folder / f"{name}.pem", folder / f"{name}.key")
        _openssl("req", "-x509", *_new_key(self.own.key), "-subj", f"/CN={name}", "-out", self.own.certificate)

    def sign(self, common_name: str, alternative_name: str = "") -> Signed:
        """Create a certificate for `common_name`, with an alternative name such as `IP:127.0.0.1`."""
        signed = Signed(self._folder / f"{common_name}.pem", self._folder / f"{common_name}.key")
        request, extensions = self._folder / f"{common_name}.csr", self._folder / f"{common_name}.ext"
        extensions.write_text(f"subjectAltName={alternative_name}\n" if alternative_name else "")
        _openssl("req", *_new_key(signed.key), "-subj", f"/CN={common_name}", "-out", request)
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.own.certificate, "-CAkey", self.own.key),
            *("-CAcreateserial", "-days", "1", "-extfile", extensions, "-out", signed.certificate),
        )
        return signed

    def encrypt_key(self, signed: Signed) -> Path:
        """Write the key with a passphrase; return its path."""
        path = signed.key.with_suffix(".encrypted.key")
        _openssl("pkey", "-in", signed.key, "-aes256", "-passout", "pass:word", "-out", path)
        return path


def _new_key(path: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
