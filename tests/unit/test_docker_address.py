"""Addresses of Docker, and names in its paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpudock_server.adapters.docker.address import EngineAddress
from gpudock_server.adapters.docker.connection import path_segment
from gpudock_server.errors import EngineRejected
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("url", "http_url"),
    [
        ("unix:///run/docker.sock", "http://localhost"),
        ("tcp://10.0.0.1", "http://10.0.0.1:2375"),
        ("tcp://[fd00::1]:99", "http://[fd00::1]:99"),
        ("https://engine.example", "https://engine.example:2376"),
    ],
)
def test_valid_engine_addresses(url: str, http_url: str) -> None:
    assert EngineAddress.parse(url, None).http_url == http_url


@pytest.mark.parametrize("url", ["", "/run/docker.sock", "unix://run/docker.sock", "unix:x", "ssh://host", "tcp://"])
def test_invalid_engine_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="engine address"):
        EngineAddress.parse(url, None)


def test_an_incomplete_or_readable_tls_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    with pytest.raises(ValueError, match=r"is missing cert\.pem, key\.pem"):
        EngineAddress.parse("tcp://host", tmp_path)
    with pytest.raises(ValueError, match="no TLS"):
        EngineAddress.parse("unix:///x", tmp_path)
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(
        ValueError, match=r"key\.pem is accessible to every user of this host \(mode 0644\); .*chmod 600"
    ):
        EngineAddress.parse("tcp://host", tmp_path)


@given(st.text(max_size=8))
def test_a_name_stays_in_its_path_segment(text: str) -> None:
    try:
        assert not set(path_segment(text)) & set("/?#%\\ \n")
        assert text not in (".", "..")
    except EngineRejected:
        pass
